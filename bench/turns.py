"""What the benchmarks share: sides that take turns, each a process of its own, and the table of what they did.

A side is a process that stays alive, does a piece of the work when it is told to, and sleeps in between; so what else
the machine does hits all sides alike, ratios come from pairs of neighbouring pieces, and peak memory is a side's own.
"""
import contextlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BEFORE = "049ebb4"  # the commit of this project that is compared with
CPU = {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}  # added to the environment of every side


def tell(text):
    """Progress, on stderr: the table alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def roots():
    """-> {side: directory of its files} for ours and for BEFORE, which is unpacked into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, "before.tar")
        result = subprocess.run(["git", "archive", "-o", archive, BEFORE], cwd=ROOT, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"git archive {BEFORE}: {result.stderr.strip()} (a clone with its history is needed)")
        with tarfile.open(archive) as tar:
            tar.extractall(Path(folder, BEFORE), filter="data")
        yield {"ours": ROOT, BEFORE: Path(folder, BEFORE)}


# ---- in the process of a side ----

def serve(logits, step, items):
    """Do what is asked for on stdin, a JSON line each, and reply on stdout, until stdin ends.

    {"logits": path, "ids": rows}: save logits(ids), float32 (B, T, V).
    {"steps": k}: step(item) -> (tokens, result) for the next k items, which come round again and again
    -> {"tokens", "seconds", "result" of the last one, "peak" memory in bytes}.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    done = 0
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # peak memory counts from here, without that of loading weights
    for line in sys.stdin:
        request, reply = json.loads(line), {}
        if "logits" in request:
            np.save(request["logits"], np.asarray(logits(request["ids"]), np.float32))
        else:
            tokens, start = 0, time.perf_counter()
            for _ in range(request["steps"]):
                n, result = step(items[done % len(items)])
                tokens, done = tokens + n, done + 1
            seconds = time.perf_counter() - start
            reply = {"tokens": tokens, "seconds": seconds, "result": result, "peak": peak_memory()}
        print(json.dumps(reply), file=replies, flush=True)


def peak_memory():
    """VmHWM of this process in bytes (Linux); the memory of tensors on a GPU where one is used."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


# ---- in the process that asks ----

class Side:
    """A process that serves. argv: a script and its flags."""

    def __init__(self, name, *argv, env=CPU):
        self.name = name
        self.process = subprocess.Popen([sys.executable, *map(str, argv)], stdin=subprocess.PIPE, text=True,
                                        stdout=subprocess.PIPE, env=os.environ | env)

    def ask(self, **request):
        """-> the reply, a dict."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}; its error is above")
        return json.loads(line)

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def compare_logits(sides, ids, tolerances, folder):
    """Refuse to go on unless all sides compute the logits of the first, for ids, a list of rows of equal length.
    tolerances: {side: largest difference}; 1e-4 for one that is not there."""
    found = []
    for side in sides:
        path = Path(folder, "logits.npy")
        side.ask(logits=str(path), ids=ids)
        found.append(np.load(path))
        worst, allowed = np.abs(found[-1] - found[0]).max(), tolerances.get(side.name, 1e-4)
        tell(f"  {side.name}: logits within {worst:.1e} of {np.abs(found[0]).max():.1f}")
        if not worst <= allowed:
            raise SystemExit(f"{side.name} computes other logits: {worst:.1e} apart, {allowed:.0e} allowed")


def compare_losses(sides):
    """Refuse to go on unless all sides find the loss of the first in their first step."""
    first = {side.name: side.ask(steps=1)["result"] for side in sides}
    tell("  loss of the first step: " + ", ".join(f"{name} {loss:.4f}" for name, loss in first.items()))
    own = first[sides[0].name]
    for name, loss in first.items():  # bfloat16 rounds logits to 3 digits
        if not abs(loss / own - 1) < 3e-3:
            raise SystemExit(f"{name} has another loss: {loss:.4f}, not {own:.4f}")


def take_turns(sides, rounds, steps):
    """-> {side: [tokens/s of each round]}, {side: peak memory in bytes}. Every other round goes backwards."""
    rates, peaks = {side.name: [] for side in sides}, {}
    for i in range(rounds):
        for side in sides[::-1 if i % 2 else 1]:
            reply = side.ask(steps=steps)
            rates[side.name].append(reply["tokens"] / reply["seconds"])
            peaks[side.name] = reply["peak"]
        tell(f"  round {i + 1} of {rounds}: "
             + ", ".join(f"{name} {values[-1]:,.0f}" for name, values in rates.items()) + " tokens/s")
    return rates, peaks


def run_command(root, *argv):
    """Run a script of the project's files in `root`. -> (wall seconds, peak memory in bytes of its largest process).
    What it prints is shown only if it fails. It compiles as a first run does: no earlier one's kernels are there."""
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+", errors="replace") as output:
        environment = os.environ | CPU | {"TORCHINDUCTOR_CACHE_DIR": cache}
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *map(str, argv)], cwd=root, env=environment, stdout=output,
                                   stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds, process.returncode = time.perf_counter() - start, os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            tell(output.read()[-4000:])
            raise SystemExit(f"{' '.join(map(str, argv))} ended with exit code {process.returncode}")
    return seconds, usage.ru_maxrss * 1024


def bench_parser(description, works, steps):
    """The flags of a benchmark with these works. steps: what --steps counts and its default."""
    from common import command_line, positive
    parser = command_line(f"{description}; the table goes to stdout.")
    if works:
        parser.add_argument("--work", choices=works, nargs="+", default=list(works), help="(default: all)")
    parser.add_argument("--rounds", type=positive(int), default=5, help="(default: %(default)s)")
    parser.add_argument("--steps", type=positive(int), help=steps)
    return parser


def spread(values, form):
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def print_header():
    print("| work | side | speed: median (min to max) | ours / it, in pairs: median (min to max) | peak memory |\n"
          "|---|---|---|---|---|", flush=True)


def print_rows(work, rates, peaks, unit="tokens/s", form=",.0f", notes=None):
    """A row of the table for each side. rates: {side: [value of each round]}, the first side is ours; more is faster,
    except in seconds."""
    ours = next(iter(rates.values()))
    for name, values in rates.items():
        ratios = [b / a if unit == "s" else a / b for a, b in zip(ours, values)]
        cells = [work, name + (notes or {}).get(name, ""), f"{spread(values, form)} {unit}",
                 "" if values is ours else f"**{median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})",
                 f"{peaks[name] / 1e6:,.0f} MB"]
        print(f"| {' | '.join(cells)} |", flush=True)
