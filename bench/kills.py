"""Kill a run again and again: python bench/kills.py --kills 50

A small run gets SIGKILL at random moments, more often than not while it saves, and is resumed each time. It must end
with the same bytes as a run that was left alone. tests/test_sturdy.py has the same with a few kills.
"""
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from common import command_line, fail, positive, seed_number, write_jsonl  # noqa: E402

from conftest import STORIES, random_model, tiny_config  # noqa: E402
from tqdm import tqdm  # noqa: E402

from checkpoint import WEIGHTS, save_model  # noqa: E402
from pretrain import train_tokenizer  # noqa: E402

STEPS_A_KILL = 8
SAVES = f"last/{WEIGHTS}", WEIGHTS  # that must be the same in the end


def start(folder, out, steps):
    resume = ["--resume"] if (out / "last").is_dir() or (out / "last.old").is_dir() else []
    settings = ["--init", folder / "model", "--data", folder / "pairs.jsonl", "--max-steps", steps, "--batch-size", 4,
                "--save-every", 2, "--eval-every", 3, "--val-fraction", 0.1, "--device", "cpu"]
    command = [sys.executable, "train_sft.py", *settings, "--out", out, *resume]
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def lines(log):
    return log.read_bytes().count(b'"loss"') if log.exists() else 0


def kill(process, out, rng):
    """Wait until the run has made some more steps, and perhaps until it saves, and kill it. -> whether it lived."""
    log = out / "log.jsonl"
    steps, saving = lines(log) + rng.randint(0, STEPS_A_KILL), rng.random() < 0.7
    while process.poll() is None:
        if lines(log) >= steps and ((out / "last.new").is_dir() or not saving):
            time.sleep(rng.random() / 100)
            process.kill()
            return process.wait() == -signal.SIGKILL
        time.sleep(0.0005)
    return False


def main(argv=None):
    parser = command_line("Kill a run again and again; it must end as if it had not been.")
    parser.add_argument("--kills", type=positive(int), default=50, help="(default: %(default)s)")
    parser.add_argument("--seed", type=seed_number, default=1, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    rng, kills, steps = random.Random(args.seed), 0, args.kills * STEPS_A_KILL
    with tempfile.TemporaryDirectory() as work, tqdm(total=args.kills, unit="kill") as bar:
        folder = Path(work)
        tokenizer = train_tokenizer(STORIES * 4, 500)
        save_model(folder / "model", random_model(tiny_config(tokenizer.vocab_size)), tokenizer)
        write_jsonl(folder / "pairs.jsonl", ({"instruction": "词汇：铲子", "output": text} for text in STORIES))
        while kills < args.kills:
            process = start(folder, folder / "killed", steps)
            if not kill(process, folder / "killed", rng):
                if process.returncode:
                    fail(f"after {kills} kills: {process.stderr.read().decode()}")
                break  # it has ended
            kills += 1
            bar.update()
        for out in ("killed", "whole"):
            process = start(folder, folder / out, steps)
            error = process.communicate()[1].decode()
            if process.returncode and "has made" not in error:
                fail(f"{out}: {error}")
        differ = [name for name in SAVES
                  if (folder / "killed" / name).read_bytes() != (folder / "whole" / name).read_bytes()]
    if differ:
        fail(f"after {kills} kills these differ: {', '.join(differ)}")
    print(f"{kills} kills, {steps} steps: the same bytes as without")


if __name__ == "__main__":
    from bench.kills import main
    main()
