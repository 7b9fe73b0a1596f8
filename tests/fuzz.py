"""Malformed files and flags, at random: python tests/fuzz.py --n 600 --seed 1

Each case spoils one thing (data, config.json, weights, an adapter, the state of a run, a flag) and runs a command on
it. A command must end by itself, with exit code 0, or 2 and one line on stderr (notices may stand before it); what can
only be a mistake must give 2. Everything else is printed, with the number of the case, which alone draws it.
"""
import argparse
import contextlib
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from common import to_path  # noqa: E402

import torch  # noqa: E402
from conftest import STORIES, random_model, tiny_config  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import augment  # noqa: E402
import evaluate  # noqa: E402
import lora  # noqa: E402
import pretrain  # noqa: E402
import sample  # noqa: E402
import train_rl  # noqa: E402
import train_sft  # noqa: E402
from checkpoint import save_model  # noqa: E402
from data import builtin  # noqa: E402

SECONDS = 60  # a case that takes longer hangs
WRONG = [True, "x", "", [], [1], {}, -1, 0, 1.5, float("nan"), float("inf"), -float("inf"), 10**12, "1e-5", "nan"]
# not "--": argparse makes an empty list of it
WRONG_FLAGS = ["", "x", "nan", "inf", "-inf", "-1", "1e999", "9" * 30, "0x10", "1,5", "\udcff", " ", "0.5.1", "1e-300",
               "1" + "0" * 400]
LARGE = "9" * 30, "1e-300", "1" + "0" * 400  # where they are allowed they are numbers like others


class Hangs(Exception):
    pass


def make(folder):
    """Good files of every kind in `folder`."""
    builtin.PLAIN = 3
    tok = pretrain.train_tokenizer(STORIES * 4, 500)
    save_model(folder / "model", random_model(tiny_config(tok.vocab_size, n_layer=1), scale=0.0), tok)
    rows = [{"instruction": f"词汇：{word}", "input": "", "output": text} for text in STORIES[:24]
            for word in ("铲子", "皮球") if word in text]
    write_rows(folder / "pairs.jsonl", rows)
    write_rows(folder / "stories.jsonl", [{"text": text} for text in STORIES[:40]])
    for main, more in ((train_sft.main, ["--out", folder / "run"]),
                       (lora.main, ["--out", folder / "adapter", "--r", "2", "--targets", "q_proj"])):
        code, err = quiet(main, [*common(folder), *more])
        assert code == 0, f"{code}: {err}"  # without it every case would seem fine


def common(folder):
    return ["--init", folder / "model", "--data", folder / "pairs.jsonl", "--max-steps", "2", "--batch-size", "8",
            "--device", "cpu"]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def quiet(main, argv):
    """-> (exit code or the traceback, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main([str(value) for value in argv])
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else str(e.code)
    except Hangs:
        code = f"takes longer than {SECONDS} s"
    except BaseException:
        code = traceback.format_exc()
    finally:
        signal.alarm(0)
    return code, err.getvalue()


# ---- what is spoilt: each takes (folder, rng) and returns (main, argv, what was done, must it be refused?) ----

def bytes_of(path, rng):
    """Spoil some bytes of a file."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(["cut", "flip", "insert", "empty", "double", "zero"])
    at = rng.randrange(len(data))
    if kind == "cut":
        data = data[:at]
    elif kind == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "insert":
        data[at:at] = rng.choice([b"\0", b"\xff", b'"', b"{", b"]", b"\n", b"\\", b"\xef\xbb\xbf"])
    elif kind == "empty":
        data = bytearray()
    elif kind == "double":
        data = data + data
    else:
        data[at:at + 8] = bytes(len(data[at:at + 8]))
    path.write_bytes(data)
    return f"{kind} of {path.name} at {at}"


def data(folder, rng):
    path = folder / rng.choice(["pairs.jsonl", "stories.jsonl"])
    must = False
    if rng.random() < 0.5:
        rows = [json.loads(line) for line in open(path, encoding="utf-8")]
        field, value = rng.choice(list(rows[0])), rng.choice([3, True, [1], {"a": 1}, "", " ", None, "\ud83d"])
        row = rng.randrange(len(rows))
        rows[row] = rng.choice([rows[row] | {field: value}, {k: v for k, v in rows[row].items() if k != field}, value])
        wanted = ("instruction", "output") if path.name == "pairs.jsonl" else ("text",)
        must = not isinstance(rows[row], (dict, str)) or isinstance(rows[row], dict) and any(
            not isinstance(rows[row].get(name), str) or not rows[row][name].strip() for name in wanted)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        done = f"row {row + 1} of {path.name}: {rows[row]!r}"
    else:
        done = bytes_of(path, rng)
    if path.name == "stories.jsonl":
        return pretrain.main, ["--data", path, "--init", folder / "model", "--max-steps", "1", "--device", "cpu",
                               "--out", folder / "new"], done, must
    main, more = rng.choice([(train_sft.main, []), (augment.main, None), (evaluate.main, None), (train_rl.main, [])])
    if main is augment.main:
        return main, [path, "--out", folder / "new", "--tokenizer", folder / "model"], done, False
    if main is evaluate.main:
        return main, ["--ckpt", folder / "model", "--base", folder / "model", "--data", path, "--samples", "1",
                      "--device", "cpu"], done, False
    return main, [*common(folder), "--out", folder / "new", *more], done, must and main is train_sft.main


def config(folder, rng):
    path = folder / "model" / "config.json"
    settings = json.loads(path.read_text())
    field, value = rng.choice(list(settings)), rng.choice(WRONG)
    numbers = [key for key, old in settings.items() if isinstance(old, (int, float)) and "token" not in key]
    if rng.random() < 0.7:
        field = rng.choice(numbers)
    same = settings[field] == value and type(settings[field]) is type(value)
    harmless = {"rms_norm_eps": (1.5, 10**12), "rope_theta": (1.5, 10**12)}  # odd, but numbers
    must = field in numbers and field != "use_cache" and not same and value not in harmless.get(field, ())
    path.write_text(json.dumps(settings | {field: value}))
    return sample.main, told(folder), f"config.json: {field} {value!r}", must


def told(folder):
    return ["--ckpt", folder / "model", "--prompt", "小猫", "--max-new-tokens", "2", "--device", "cpu"]


def weights(folder, rng):
    of = rng.choice(["model", "adapter"])
    path = folder / of / ("model.safetensors" if of == "model" else lora.TENSORS)
    argv = told(folder) + (["--adapter", folder / "adapter"] if of == "adapter" else [])
    if rng.random() < 0.3:
        return sample.main, argv, bytes_of(path, rng), False
    with_base = {"base": "{}"} if of == "adapter" else None
    tensors = load_file(path)
    name = rng.choice(list(tensors))
    tensor = tensors.pop(name)
    kind = rng.choice(["gone", "nan", "inf", "int", "bool", "fp8", "double", "shape", "renamed"])
    if kind == "renamed":
        tensors[name + "x"] = tensor
    elif kind != "gone":
        tensors[name] = {"nan": tensor * float("nan"), "inf": torch.full_like(tensor, float("inf")),
                         "int": tensor.to(torch.int32), "bool": tensor.bool(), "fp8": tensor.to(torch.float8_e4m3fn),
                         "double": torch.full(tensor.shape, 1e300, dtype=torch.float64),
                         "shape": torch.cat([tensor, tensor])}[kind].contiguous()
    save_file(tensors, path, metadata=with_base)
    return sample.main, argv, f"{path.name}: {name} {kind}", True


def adapter(folder, rng):
    path = folder / "adapter" / lora.CONFIG
    if rng.random() < 0.2:
        done, must = bytes_of(path, rng), False
    else:
        settings = json.loads(path.read_text())
        field = rng.choice(["r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "peft_type", "use_qalora"])
        value = rng.choice(WRONG)
        off = "", [], {}, 0  # as good as absent
        fine = {"lora_alpha": (1.5, 10**12), "lora_dropout": off, "use_rslora": (True, *off), "use_qalora": off}
        must = value not in fine.get(field, ())
        path.write_text(json.dumps(settings | {field: value}))
        done = f"{lora.CONFIG}: {field} {value!r}"
    return sample.main, [*told(folder), "--adapter", folder / "adapter"], done, must


def state(folder, rng):
    out = folder / rng.choice(["run", "adapter"])
    main = train_sft.main if out.name == "run" else lora.main
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.suffix != ".png"]
    path = rng.choice(files)
    if rng.random() < 0.2:
        path.unlink()
        done = f"{path.relative_to(folder)} is gone"
    elif path.name == "train_state.pt" and rng.random() < 0.7:
        content = torch.load(path, weights_only=True)
        field, value = rng.choice(["step", "best", "optimizer"]), rng.choice(WRONG)
        torch.save(content | {field: value}, path)
        done = f"train_state.pt: {field} {value!r}"
    elif path.name == "args.json" and rng.random() < 0.7:
        settings = json.loads(path.read_text())
        field, value = rng.choice(list(settings)), rng.choice(WRONG)
        path.write_text(json.dumps(settings | {field: value}))
        done = f"args.json: {field} {value!r}"
    else:
        done = f"{path.parent.name}: {bytes_of(path, rng)}"
    return main, ["--resume", "--out", out, "--max-steps", "3"], done, False


def flags(folder, rng):
    main, argv = rng.choice([
        (train_sft.main, [*common(folder), "--out", folder / "new"]), (sample.main, told(folder)),
        (lora.main, [*common(folder), "--out", folder / "new", "--r", "2"]),
        (train_rl.main, [*common(folder), "--out", folder / "new", "--prompts", "2", "--group", "2"]),
        (pretrain.main, ["--data", folder / "stories.jsonl", "--init", folder / "model", "--max-steps", "1", "--device",
                         "cpu", "--out", folder / "new"])])
    parsers = []
    real = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = lambda self, *a, **k: parsers.append(self) or real(self, *a, **k)
    try:
        quiet(main, ["--nonsense"])
    finally:
        argparse.ArgumentParser.parse_args = real
    with_value = [action for action in parsers[0]._actions if action.nargs != 0 and action.option_strings]
    action = rng.choice([a for a in with_value if a.dest not in ("instruction", "prompt", "log")])
    flag, value = action.option_strings[-1], rng.choice(WRONG_FLAGS)
    bad_path = value in ("", "\udcff")  # the others are names of folders
    return main, [*argv, f"{flag}={value}"], f"{main.__module__} {flag}={value!r}", (
        bad_path if action.type is to_path else action.type is not None and value not in LARGE)


KINDS = data, config, weights, adapter, state, flags


def run_case(number, good):
    """-> (what was done, what is wrong with the outcome or None)."""
    rng = random.Random(f"fuzz-{number}")
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):  # a relative --out is in there, too
        folder = Path(work) / "files"
        shutil.copytree(good, folder)
        main, argv, done, must = KINDS[number % len(KINDS)](folder, rng)
        code, err = quiet(main, argv)
    last = [line for line in err.strip().split("\n") if "error: " in line]
    if code not in (0, 2):
        return done, f"{main.__module__}: {code}"
    if code == 2 and (len(last) != 1 or not err.strip().endswith(last[0])):
        return done, f"{main.__module__}: not one line: {err[-500:]}"
    if code == 0 and must:
        return done, f"{main.__module__}: not refused"
    return done, None


def main(argv=None):
    parser = argparse.ArgumentParser(description="Malformed files and flags, at random.")
    parser.add_argument("--n", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1, help="the number of the first case is seed x 1,000,000")
    args = parser.parse_args(argv)

    def hangs(*_):
        raise Hangs
    before = signal.signal(signal.SIGALRM, hangs)
    wrong, kinds = [], Counter()
    try:
        with tempfile.TemporaryDirectory() as work:
            make(Path(work) / "good")
            for i in range(args.n):
                number = args.seed * 1_000_000 + i
                done, problem = run_case(number, Path(work) / "good")
                kinds[KINDS[number % len(KINDS)].__name__] += 1
                if problem:
                    wrong.append(number)
                    print(f"{number}: {done}\n    {problem}", flush=True)
    finally:
        signal.signal(signal.SIGALRM, before)
    print(f"{args.n} cases ({', '.join(f'{name} {n}' for name, n in kinds.items())}): {len(wrong)} wrong")
    return wrong


if __name__ == "__main__":
    raise SystemExit(1 if main() else 0)
