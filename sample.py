"""Write stories: from instructions, from an opening, from a file of prompts, or the study's eight test cases.

    python sample.py                                    the eight cases
    python sample.py --instruction "词汇：铲子，草地\\n特点：对话"
    python sample.py --prompt "从前有一只小猫"
    python sample.py --file prompts.txt --out stories.jsonl
"""
import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import find_model, load_model
from common import fail, pick_device, pick_dtype, write_atomic
from constraints import LIST_KEYS, WORDS, check, parse
from dataset import encode_prompt
from records import read_blocks, read_records, text_field

# The study's test cases: shown, never trained on.
TWO_WORDS = "词汇：铲子，草地"
TWIST = "特点：转折"
ANT = "摘要：一只小蚂蚁在花园里寻找吃的，最后找到了一个苹果。"
CLOUDS = "随机句子：天空中飘着几朵白云。"
SINGLE = {"temperature": 0.2, "top_p": 0.9, "top_k": 30}
COMBINED = {"temperature": 0.9, "top_p": 1.0, "top_k": 30}
CASES = [
    ("prompt", "汤姆和杰瑞是一对好朋友", SINGLE),
    ("instruction", TWO_WORDS, SINGLE),
    ("instruction", TWIST, SINGLE),
    ("instruction", ANT, SINGLE),
    ("instruction", CLOUDS, SINGLE),
    ("instruction", f"{TWO_WORDS}\n{TWIST}", COMBINED),
    ("instruction", f"{TWO_WORDS}\n{ANT}", COMBINED),
    ("instruction", f"{TWO_WORDS}\n{CLOUDS}\n{ANT}", COMBINED),
]
BATCH = 64  # prompts of a file that are continued at once


def encode_request(tokenizer, kind, text, block_size):
    """An instruction, or the plain opening of a story, -> ids. Raises ValueError if it leaves no room for a story."""
    # base models read stories with EOS between them, so EOS is what stands before a story without an opening
    ids = encode_prompt(tokenizer, text) if kind == "instruction" else tokenizer.encode(text) or [tokenizer.eos_id]
    if len(ids) >= block_size:
        raise ValueError(f"a prompt of {len(ids)} tokens leaves no room in {block_size}: {text[:20]!r}…")
    return ids


def verdicts(instruction, story):
    """Which checkable constraints are met, as a line to print: ✓ 词汇 铲子  ✗ 随机句子. Empty if none is checkable."""
    marks = []
    for key, met in check(story, parse(instruction)[0]).items():
        named = {f"{key} {name}": ok for name, ok in met.items()} if key in LIST_KEYS else {key: met}
        marks += [f"{'✓' if ok else '✗'} {name}" for name, ok in named.items() if ok is not None]
    return "  ".join(marks)


def tell(model, tokenizer, kind, text, max_new_tokens, seed, sampling):
    """Print one prompt, its story as it comes, and which constraints the story meets."""
    prompt = encode_request(tokenizer, kind, text, model.config.block_size)
    print("─" * 60)
    print(text, end="" if kind == "prompt" else "\n\n")
    ids = model.stream([prompt], max_new_tokens, eos_id=tokenizer.eos_id, seed=seed, **sampling)
    story = ""
    for piece in tokenizer.decode_stream(row[0] for row in ids):
        print(piece, end="", flush=True)
        story += piece
    print()
    if kind == "instruction" and verdicts(text, story):
        print("\n" + verdicts(text, story))


def print_cases(model, tokenizer, max_new_tokens=400, seed=1337):
    """The study's eight test cases, each with the study's own sampling values."""
    for kind, text, sampling in CASES:
        try:
            tell(model, tokenizer, kind, text, max_new_tokens, seed, sampling)
        except ValueError as e:  # a model of a very short context
            print(f"{text}\n({e})")


def read_prompts(path):
    """JSONL instruction records, or blocks of lines separated by blank lines -> list of instructions."""
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        is_json = f.read(4096).lstrip()[:1] in ("{", "[")
    if is_json:
        prompts = []
        for row, record in read_records(path):
            parts = [text_field(path, row, record, ["instruction"]),
                     text_field(path, row, record, ["input"], required=False)]
            prompts.append("\n".join(filter(None, parts)))
    else:
        prompts = read_blocks(path)
    if not prompts:
        raise ValueError(f"{path}: no prompts")
    return prompts


def tally(stories):
    """[(instruction, story)] -> how many stories meet a constraint, of those where a rule can tell; for 词汇 all the
    words, and then the words one by one."""
    met, of = Counter(), Counter()
    for instruction, story in stories:
        for key, result in check(story, parse(instruction)[0]).items():
            told = [ok for ok in (result.values() if key in LIST_KEYS else [result]) if ok is not None]
            counts = {key: [all(told)] if told else []} | ({"each word": told} if key == WORDS else {})
            for name, oks in counts.items():
                met[name] += sum(oks)
                of[name] += len(oks)
    return ", ".join(f"{name} {met[name]}/{of[name]}" for name in of if of[name])


def generate_all(model, prompts, eos_id, seed, sampling, quiet=None):
    """Continue many prompts (lists of ids), rows of like length in a batch -> a list of new ids a prompt.

    sampling: what `GPT.generate` takes. quiet: True hides the progress bar, None shows it on a terminal only.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [None] * len(prompts)
    with tqdm(total=len(prompts), unit="story", disable=quiet) as bar:
        for start in range(0, len(order), BATCH):
            rows = order[start:start + BATCH]
            told = model.generate([prompts[i] for i in rows], eos_id=eos_id, seed=seed + start, **sampling)
            for i, ids in zip(rows, told):
                texts[i] = ids
            bar.update(len(rows))
    return texts


def tell_file(model, tokenizer, prompts, max_new_tokens, seed, sampling, out):
    """Continue many instructions, a batch at a time; print the stories, or write JSONL records to the file `out`."""
    encoded = [encode_request(tokenizer, "instruction", text, model.config.block_size) for text in prompts]
    start_time = time.perf_counter()
    texts = generate_all(model, encoded, tokenizer.eos_id, seed, sampling | {"max_new_tokens": max_new_tokens})
    stories, tokens = [tokenizer.decode(ids) for ids in texts], sum(map(len, texts))
    seconds = time.perf_counter() - start_time
    print(f"{len(stories)} stories, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s; met: "
          f"{tally(zip(prompts, stories)) or 'nothing that can be checked'}", file=sys.stderr)
    if out is None:
        for text, story in zip(prompts, stories):
            print("─" * 60, text, "", story, "", verdicts(text, story), sep="\n")
        return
    lines = [json.dumps({"instruction": text, "output": story, "met": check(story, parse(text)[0])},
                        ensure_ascii=False) + "\n" for text, story in zip(prompts, stories)]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, lambda p: p.write_text("".join(lines), encoding="utf-8"))
    print(f"{len(stories)} stories -> {out}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Write stories. Without a prompt: the study's eight test cases.")
    parser.error = fail  # without argparse's lines of usage
    parser.add_argument("--ckpt", nargs="?", type=Path, help="model directory (default: out/sft, else the base model)")
    parser.add_argument("--adapter", type=Path, help="LoRA adapter directory, put on --ckpt")
    parser.add_argument("--adapter-scale", type=float, default=1.0,
                        help="how much of the adapter: 0 is the model alone (default: %(default)s)")
    # what to write about
    parser.add_argument("--instruction", action="append", default=[],
                        help=r"constraint lines, \n between them (repeatable)")
    parser.add_argument("--prompt", action="append", default=[], help="the opening of a story (repeatable)")
    parser.add_argument("--file", type=Path, help="JSONL instruction records, or blocks separated by blank lines")
    parser.add_argument("--out", type=Path, help="with --file: write JSONL records here")
    # sampling
    parser.add_argument("--temperature", type=float, default=0.2, help="0 is argmax (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.9, help="in (0, 1] (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=30, help="0 is off (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=400, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1337, help="(default: %(default)s)")
    # machine
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--dtype", choices=["32-true", "bf16-true"], default="32-true", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.temperature >= 0:
        parser.error(f"--temperature {args.temperature} is below 0")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top-p {args.top_p} is outside (0, 1]")
    if args.top_k < 0:
        parser.error(f"--top-k {args.top_k} is below 0")
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {args.max_new_tokens} is below 1")
    if args.out and (not args.file or args.out.is_dir()):
        parser.error("--out is a file, and goes with --file")
    return args


def main(argv=None):
    args = parse_args(argv)
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k or None}
    asked = [("instruction", text.replace("\\n", "\n")) for text in args.instruction]
    asked += [("prompt", text) for text in args.prompt]
    try:
        ckpt = find_model(args.ckpt, args.adapter)
        device = pick_device(args.device)
        model, tokenizer = load_model(ckpt, args.adapter, args.adapter_scale)
        model.to(device, torch.bfloat16 if pick_dtype(args.dtype, device) == "bf16-true" else torch.float32).eval()
        prompts = read_prompts(args.file) if args.file else []
        for kind, text in [*asked, *(("instruction", text) for text in prompts)]:
            encode_request(tokenizer, kind, text, model.config.block_size)  # before the first story is written
    except (ValueError, OSError) as e:
        fail(e)
    print(f"{ckpt}: {model.num_params():,} parameters", file=sys.stderr)
    if prompts:
        tell_file(model, tokenizer, prompts, args.max_new_tokens, args.seed, sampling, args.out)
    for kind, text in asked:
        tell(model, tokenizer, kind, text, args.max_new_tokens, args.seed, sampling)
    if not prompts and not asked:
        print_cases(model, tokenizer, args.max_new_tokens, args.seed)


if __name__ == "__main__":
    from sample import main
    main()
