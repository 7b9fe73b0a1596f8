"""Write stories: from instructions, from an opening, from a file of prompts, or the study's eight test cases.

    python sample.py                                    the eight cases
    python sample.py --instruction "词汇：铲子，草地\\n特点：对话"
    python sample.py --instruction "词汇：铲子，草地\\n特点：对话" --best-of 8
    python sample.py --prompt "从前有一只小猫"
    python sample.py --file prompts.txt --out stories.jsonl
"""
import argparse
import contextlib
import re
import sys
import time
from collections import Counter

import common
from common import count, fail, not_negative, number, pick_device, pick_dtype, positive, seed_number, to_path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import find_model, load_model
from constraints import KEYS, LIST_KEYS, SUMMARY, check, clauses_told, outcomes, parse
from dataset import encode_prompt, in_batches
from decoding import generate, stream
from force import steer_to
from model import IGNORE
from records import SURROGATE, instruction_of, read_blocks, read_records

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
BEST_OF_TEMPERATURE = 0.7
INTERACTIVE = "temperature", "top-p", "top-k", "best-of", "force", "no-force", "max-new-tokens", "seed"  # set by /…
UNREAD = f"no line of this request begins with {'：, '.join(KEYS)}："  # a typing mistake, or no constraints
BATCH = 64  # stories that are written at once
JSON = re.compile(r"\s*(\{|\[\s*[{\]])")  # how a file of records begins; [词汇]：… is the text of a prompt


def encode_request(tokenizer, kind, text, block_size):
    """An instruction, or the plain opening of a story, -> ids. Raises ValueError if it is no text, or leaves no room
    for a story."""
    if SURROGATE.search(text):
        raise ValueError("a prompt holds half of a surrogate pair, which is no character: is it UTF-8?")
    # base models read stories with EOS between them, so EOS is what stands before a story without an opening
    ids = encode_prompt(tokenizer, text) if kind == "instruction" else tokenizer.encode(text) or [tokenizer.eos_id]
    if len(ids) >= block_size:
        raise ValueError(f"a prompt of {len(ids)} tokens leaves no room in {block_size}: {text[:20]!r}…")
    return ids


def flat(met):
    """What `check` found -> {"词汇 铲子": True, "随机句子": False, …}, without what no rule can tell."""
    found = {}
    for key, value in met.items():
        found |= {f"{key} {name}": ok for name, ok in value.items()} if key in LIST_KEYS else {key: value}
    return {name: ok for name, ok in found.items() if ok is not None}


def marks(met):
    """What `check` found, as a line to print: ✓ 词汇 铲子  ✗ 随机句子. Empty if no rule can tell."""
    return "  ".join(f"{'✓' if ok else '✗'} {name}" for name, ok in flat(met).items())


def counts(results):
    """[what `check` found in a story] -> how often each constraint is met, of the times a rule can tell."""
    met, of = Counter(), Counter()
    for result in results:
        for name, known in outcomes(result).items():
            met[name] += sum(known)
            of[name] += len(known)
    return ", ".join(f"{name} {met[name]}/{of[name]}" for name in of)


@torch.no_grad()
def log_probs(model, x, y):
    """x, y (B, T) as from `collate` -> the log probability of each y, in nats, float32 (B, T); 0 where y is IGNORE."""
    device = model.lm_head.weight.device
    return -F.cross_entropy(model(x.to(device)).float().transpose(1, 2), y.to(device), ignore_index=IGNORE,
                            reduction="none")


def mean_log_probs(model, prompt, drawn):
    """The model's mean log probability, in nats per token, of each of the drawn continuations (lists of ids)."""
    rows = [(prompt + ids, [IGNORE] * len(prompt) + ids) for ids in drawn]
    return [mean for x, y in in_batches(rows, 16)
            for mean in (log_probs(model, x, y).sum(1).cpu() / (y != IGNORE).sum(1).clamp(min=1)).tolist()]


def scores(model, tokenizer, prompt, constraints, drawn, max_new_tokens):
    """For each of the drawn continuations (how much it meets of what a rule can tell, how many clauses of the summary
    it tells, its mean log probability). The largest is the best."""
    room = min(max_new_tokens, model.config.block_size - len(prompt))
    ended = [ids + [tokenizer.eos_id] * (len(ids) < room) for ids in drawn]
    stories = [tokenizer.decode(ids) for ids in drawn]
    met = [sum(flat(check(story, constraints)).values()) for story in stories]
    told = [sum(clauses_told(constraints.get(SUMMARY, ""), story)) for story in stories]
    return list(zip(met, told, mean_log_probs(model, prompt, ended)))


def best(model, tokenizer, prompt, constraints, drawn, max_new_tokens):
    """-> the best story of the drawn continuations, and a line that says how many of them meet everything."""
    score = scores(model, tokenizer, prompt, constraints, drawn, max_new_tokens)
    story = tokenizer.decode(drawn[score.index(max(score))])
    asked = len(flat(check(story, constraints)))
    if not asked and SUMMARY in constraints:
        return story, f"the one of {len(drawn)} that tells most of the summary: nothing else can be checked"
    if not asked:
        return story, f"the likeliest of {len(drawn)}: nothing that can be checked is asked for"
    whole = sum(met == asked for met, _, _ in score)
    return story, f"{whole} of {len(drawn)} meet everything that can be checked"


def print_story(model, tokenizer, kind, text, max_new_tokens, seed, sampling, best_of=1):
    """Print one prompt, its story, and which constraints the story meets; a single draw as it comes."""
    prompt = encode_request(tokenizer, kind, text, model.config.block_size)
    constraints = parse(text)[0] if kind == "instruction" else {}
    print("─" * 60)
    print(text, end="" if kind == "prompt" else "\n\n", flush=True)
    story = told = ""
    if best_of == 1:
        ids = stream(model, [prompt], max_new_tokens, eos_id=tokenizer.eos_id, seed=seed, **sampling)
        for piece in tokenizer.decode_stream(row[0] for row in ids):
            print(piece, end="", flush=True)
            story += piece
        print()
    else:
        drawn = generate_all(model, [prompt], tokenizer.eos_id, seed, sampling | {"max_new_tokens": max_new_tokens},
                             samples=best_of)
        story, told = best(model, tokenizer, prompt, constraints, drawn, max_new_tokens)
        print(story)
    unread = kind == "instruction" and not constraints
    if lines := list(filter(None, (marks(check(story, constraints)), told, unread and UNREAD))):
        print("", *lines, sep="\n")


def print_cases(model, tokenizer, max_new_tokens=400, seed=1337, best_of=1, **changes):
    """The study's eight test cases, each with the study's own sampling values but for the changes."""
    for kind, text, sampling in CASES:
        try:
            print_story(model, tokenizer, kind, text, max_new_tokens, seed, sampling | changes, best_of)
        except ValueError as e:  # a model of a very short context
            print(f"{text}\n({e})")


def read_prompts(path):
    """JSONL instruction records, or blocks of lines separated by blank lines -> list of instructions."""
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        is_json = JSON.match(f.read(4096))
    prompts = ([instruction_of(path, row, record) for row, record in read_records(path)] if is_json
               else read_blocks(path))
    if not prompts:
        raise ValueError(f"{path}: no prompts")
    return prompts


def generate_all(model, prompts, eos_id, seed, sampling, quiet=None, samples=1):
    """Continue many prompts (lists of ids), rows of like length in a batch -> a list of new ids a prompt, or `samples`
    of them, side by side, as of `decoding.generate`.

    sampling: what `decoding.generate` takes. quiet: True hides the progress bar, None shows it on a terminal only.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    at_once = max(1, BATCH // samples)
    continued = [None] * (len(prompts) * samples)
    with tqdm(total=len(prompts) * samples, unit="story", disable=quiet) as bar:
        for start in range(0, len(order), at_once):
            rows = order[start:start + at_once]
            batch = generate(model, [prompts[i] for i in rows], eos_id=eos_id, seed=seed + start * samples,
                             samples=samples, **sampling)
            for place, i in enumerate(rows):
                continued[i * samples:(i + 1) * samples] = batch[place * samples:(place + 1) * samples]
            bar.update(len(batch))
    return continued


def continue_file(model, tokenizer, instructions, max_new_tokens, seed, sampling, out, best_of=1):
    """Write a story for each of many instructions, a batch at a time; print them, or write JSONL records to `out`."""
    prompts = [encode_request(tokenizer, "instruction", text, model.config.block_size) for text in instructions]
    asked = [parse(text)[0] for text in instructions]
    start = time.perf_counter()
    drawn = generate_all(model, prompts, tokenizer.eos_id, seed, sampling | {"max_new_tokens": max_new_tokens},
                         samples=best_of)
    groups = [drawn[i:i + best_of] for i in range(0, len(drawn), best_of)]
    chosen = [best(model, tokenizer, *row, max_new_tokens) if best_of > 1 else (tokenizer.decode(row[2][0]), "")
              for row in zip(prompts, asked, groups)]
    seconds, tokens = time.perf_counter() - start, sum(map(len, drawn))
    stories = [story for story, _ in chosen]
    met = [check(story, constraints) for constraints, story in zip(asked, stories)]
    draws = f", each the best of {best_of}" if best_of > 1 else ""
    print(f"{len(stories)} stories{draws}, {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s; "
          f"met: {counts(met) or 'nothing that can be checked'}", file=sys.stderr)
    if out is None:
        for text, constraints, (story, told), result in zip(instructions, asked, chosen, met):
            lines = filter(None, (marks(result), told, not constraints and UNREAD))
            print("─" * 60, text, "", story, "", *lines, sep="\n")
        return
    common.write_jsonl(out, ({"instruction": text, "output": story, "met": result} | ({"draws": told} if told else {})
                             for text, (story, told), result in zip(instructions, chosen, met)))
    print(f"{len(stories)} stories -> {out}")


def given_sampling(args, tokenizer):
    """The sampling values that the flags give, and the temperature that several draws want."""
    given = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    usual = {"temperature": BEST_OF_TEMPERATURE} if args.best_of > 1 else {}
    chosen = usual | {name: value for name, value in given.items() if value is not None}
    chosen |= {"top_k": None} if args.top_k == 0 else {}
    return chosen | ({"steer": steer_to(tokenizer)} if args.force else {})


def converse(model, tokenizer, args):
    """Read constraint lines; a blank line ends an instruction, and its story is written. /temperature 0.8 sets a flag,
    /quit ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, arrow keys and history
    print("Constraint lines, then a blank line: a story. /temperature 0.8, /best-of 8, … change a flag; /quit ends.")
    lines, told = [], 0
    while True:
        ended = False
        try:
            line = input(("  " if lines else "> ") if sys.stdin.isatty() else "")
        except EOFError:
            line, ended = "", True
        except KeyboardInterrupt:
            return print()
        except UnicodeDecodeError as e:
            print(f"what was typed is not {e.encoding}")
            continue
        if line.startswith("/"):
            name, _, value = line[1:].strip().partition(" ")
            if name in ("quit", "exit"):
                return
            try:
                if name not in INTERACTIVE:
                    fail(f"/{name}: there are {', '.join('/' + known for known in INTERACTIVE)}, /quit")
                new = parse_args(f"--{name} {value}".split(maxsplit=1))
            except SystemExit:  # it has said what is wrong
                continue
            flag = name.removeprefix("no-").replace("-", "_")
            setattr(args, flag, getattr(new, flag))
            told = 0 if name == "seed" else told
        elif line.strip():
            lines.append(line)
        elif lines:
            try:
                print_story(model, tokenizer, "instruction", "\n".join(lines), args.max_new_tokens, args.seed + told,
                            SINGLE | given_sampling(args, tokenizer), args.best_of)
            except ValueError as e:
                print(e)
            except KeyboardInterrupt:  # enough of this story
                print()
            lines, told = [], told + 1  # the same lines again are another story
        if ended:
            return print()


def parse_args(argv=None):
    parser = common.command_line("Write stories. Without a prompt: the study's eight test cases.")
    parser.add_argument("--ckpt", nargs="?", type=to_path,
                        help="model directory (default: out/sft, else the base model)")
    parser.add_argument("--adapter", type=to_path, help="LoRA adapter directory, put on --ckpt")
    parser.add_argument("--adapter-scale", type=number(float, lambda scale: abs(scale) <= 1e6, "is beyond 1e6"),
                        default=1.0, help="how much of the adapter: 0 is the model alone (default: %(default)s)")
    # what to write about
    parser.add_argument("--instruction", action="append", default=[],
                        help=r"constraint lines, \n between them (repeatable)")
    parser.add_argument("--prompt", action="append", default=[], help="the opening of a story (repeatable)")
    parser.add_argument("-i", "--interactive", action="store_true", help="type instructions, read stories")
    parser.add_argument("--file", type=to_path, help="JSONL instruction records, or blocks separated by blank lines")
    parser.add_argument("--out", type=to_path, help="with --file: write JSONL records here")
    parser.add_argument("--overwrite", action="store_true", help="--out may be there already")
    # sampling
    parser.add_argument("--best-of", type=count, default=1, metavar="N",
                        help="draw N stories, show the one that meets most of what can be checked; of equals the one "
                             "that tells most clauses of the summary, then the likeliest (default: %(default)s)")
    parser.add_argument("--temperature", type=not_negative(float),
                        help="0 is argmax (default: 0.2, with --best-of 0.7)")
    parser.add_argument("--top-p", type=number(float, lambda p: 0 < p <= 1, "is outside (0, 1]"),
                        help=f"in (0, 1] (default: {SINGLE['top_p']})")
    parser.add_argument("--top-k", type=not_negative(int), help=f"0 is off (default: {SINGLE['top_k']})")
    parser.add_argument("--force", action=argparse.BooleanOptionalAction, default=False,
                        help="asked words and the sentence become likelier the longer a story does without them")
    parser.add_argument("--max-new-tokens", type=positive(int), default=400, help="(default: %(default)s)")
    parser.add_argument("--seed", type=seed_number, default=1337, help="(default: %(default)s)")
    # machine
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--dtype", choices=["32-true", "bf16-true"], default="32-true", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.best_of > 1 and args.temperature == 0:
        fail(f"--best-of {args.best_of}: at --temperature 0 all draws are the same")
    if args.out and (not args.file or args.out.is_dir()):
        fail("--out is a file, and goes with --file")
    if args.out and args.out.exists() and args.file.exists() and args.out.samefile(args.file):
        fail(f"--out {args.out} is the --file itself")
    if args.out and args.out.exists() and not args.overwrite:
        fail(f"--out {args.out} is there already: --overwrite replaces it")
    return args


def main(argv=None):
    args = parse_args(argv)
    requests = [("instruction", text.replace("\\n", "\n")) for text in args.instruction]
    requests += [("prompt", text) for text in args.prompt]
    try:
        if args.out:
            common.check_writable(args.out.parent)  # before the work
        ckpt = find_model(args.ckpt, args.adapter)
        device = pick_device(args.device)
        model, tokenizer = load_model(ckpt, args.adapter, args.adapter_scale)
        model.to(device, torch.bfloat16 if pick_dtype(args.dtype, device) == "bf16-true" else torch.float32).eval()
        instructions = read_prompts(args.file) if args.file else []
        for kind, text in [*requests, *(("instruction", text) for text in instructions)]:
            encode_request(tokenizer, kind, text, model.config.block_size)  # before the first story is written
        print(f"{ckpt}: {model.num_params():,} parameters", file=sys.stderr)
        given = given_sampling(args, tokenizer)
        if instructions:
            continue_file(model, tokenizer, instructions, args.max_new_tokens, args.seed, SINGLE | given, args.out,
                          args.best_of)
        for kind, text in requests:
            print_story(model, tokenizer, kind, text, args.max_new_tokens, args.seed, SINGLE | given, args.best_of)
        if args.interactive:
            converse(model, tokenizer, args)
        elif not instructions and not requests:
            print_cases(model, tokenizer, args.max_new_tokens, args.seed, args.best_of, **given)
    except (ValueError, OSError) as e:
        fail(e)


if __name__ == "__main__":
    from sample import main
    main()
