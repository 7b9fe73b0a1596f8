"""How fast are augment.py and data/prepare.py, and what memory do they take? python bench/data_speed.py

Makes its files (about 2.5 GB) in a temporary folder, runs the commands as a user would, and prints a table. Give it an
idle machine; it takes about ten minutes, most of them for making the stories.
"""
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import command_line, positive, write_jsonl  # noqa: E402

from constraints import KEYS, render  # noqa: E402
from data.generate import stories  # noqa: E402

ENGLISH = {"词汇": "Words", "特点": "Features", "摘要": "Summary", "随机句子": "Random sentence"}


def memory_of(pid):
    """Bytes that a process and its children hold at the moment, what they share counted once (Linux)."""
    total = 0
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        total += sum(memory_of(child) for child in task.read_text().split())
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return total + int(fields["Pss"].split()[0]) * 1024


def measure(*argv):
    """Run a command. -> (seconds, peak memory in bytes of all its processes together)."""
    peak, start = 0, time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, stdout=subprocess.DEVNULL)
    over = threading.Event()

    def watch():
        nonlocal peak
        while not over.wait(0.1):
            try:
                peak = max(peak, memory_of(process.pid))
            except (OSError, ValueError):  # it has ended, or one of its children
                pass
    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - start
    over.set()
    watcher.join()
    if code:
        raise SystemExit(f"{' '.join(map(str, argv))} ended with exit code {code}")
    return seconds, peak


def studys_rows(records, rng):
    """Rows with so many of one, two, three and four constraints that they have the study's 5.46 orders each."""
    for i, record in enumerate(records):
        k = (1, 2, 3, 3, 4)[i % 5] if i % 50 < 31 else (1, 2, 2)[i % 3]
        values = {"词汇": "，".join(record["words"][:2]), "特点": "转折", "摘要": record["summary"],
                  "随机句子": record["sentence"]}
        keys = rng.choice(list(combinations(KEYS, k)))
        yield {"instruction": "\n".join(f"{key}：{values[key]}" for key in keys), "input": "", "output": record["text"]}


def write_instruct(path, records, size):
    """A TinyStories-Instruct file of so many bytes, its stories told over and over."""
    heads = []
    for record in records:
        text = render({"词汇": record["words"][:3], "摘要": record["summary"], "随机句子": record["sentence"]})
        for key, name in ENGLISH.items():
            text = text.replace(f"{key}：", f"{name}: ")
        heads.append(text)
    with open(path, "wb") as f:
        n = 0
        while f.tell() < size:
            i = n % len(records)
            f.write(f"{heads[i]}\nStory: \n\n{n}. {records[i]['text']}\n<|endoftext|>\n".encode())
            n += 1


def main(argv=None):
    parser = command_line("Speed and memory of augment.py and data/prepare.py.")
    parser.add_argument("--stories", type=positive(int), default=100_000, help="(default: %(default)s)")
    parser.add_argument("--gigabytes", type=positive(float), default=1.0,
                        help="of the text file (default: %(default)s)")
    args = parser.parse_args(argv)
    rng = random.Random(0)
    print("| what | result | seconds | memory |\n|---|---|---|---|")

    def tell(what, result, seconds, memory):
        print(f"| {what} | {result} | {seconds:.1f} | {memory / 1e6:.0f} MB |", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        records = list(stories(args.stories, 5))

        write_jsonl(folder / "rows.jsonl", studys_rows(records[:13_000], rng))
        used = measure("augment.py", folder / "rows.jsonl", "--out", folder / "rows", "--exact", "--val-fraction", "0")
        after = json.loads((folder / "rows" / "report.json").read_text(encoding="utf-8"))["rows"]["after"]
        tell("augment.py, 13,000 records, all orders", f"{after:,} rows", *used)

        write_instruct(folder / "instruct.txt", records, args.gigabytes * 1e9)
        size = (folder / "instruct.txt").stat().st_size
        used = measure("augment.py", folder / "instruct.txt", "--out", folder / "instruct", "--permute", "1")
        tell(f"augment.py, {size / 1e9:.2f} GB of TinyStories-Instruct text", f"{size / 1e6 / used[0]:.1f} MB/s", *used)
        (folder / "instruct.txt").unlink()

        write_jsonl(folder / "plain.jsonl", ({"text": record["text"]} for record in records))
        plain = (folder / "plain.jsonl", "--extract", "sentence", "--permute", "1", "--overwrite", "--out")
        exact = measure("augment.py", *plain, folder / "plain", "--exact")
        near = measure("augment.py", *plain, folder / "plain")
        tell(f"augment.py, near-duplicates among {len(records):,} stories", f"beyond {exact[0]:.1f} s without",
             near[0] - exact[0], near[1])

        size = sum(len(record["text"].encode()) for record in records)
        used = measure("data/prepare.py", folder / "plain.jsonl", "--out", folder / "tokens", "--tokenizer", "base")
        tell(f"data/prepare.py, {size / 1e6:.0f} MB of story text", f"{size / 1e6 / used[0]:.1f} MB/s", *used)


if __name__ == "__main__":
    from bench.data_speed import main
    main()
