"""Does it follow instructions, and can it still write? python evaluate.py --ckpt out/sft

Prints a table and writes eval.json. Stories are sampled for every instruction and judged by the rules of
constraints.py; beside the model stand the ceiling (the stories that the instructions were made from, judged by the same
rules) and the floor (the untuned base). Every rate has a 95% bootstrap interval over instructions.

Of the features a rule sees only 对话; what cannot be checked is left out, and counted.
"""
import math
import time
import unicodedata
from collections import defaultdict
from pathlib import Path

from common import (
    check_writable,
    codec,
    command_line,
    count,
    fail,
    not_negative,
    pick_device,
    seed_number,
    to_path,
    write_json,
)

import numpy as np
import torch

from checkpoint import find_base, find_model, load_model
from constraints import (
    EACH_WORD,
    FEATURE,
    FEATURES,
    KEYS,
    SENTENCE,
    SUMMARY,
    WORDS,
    check,
    clauses_told,
    fold,
    outcomes,
    render,
    sentences,
)
from data import builtin
from data.judged import RARE, add_rivals, builtin_rows, checkable, read_rows
from dataset import by_length, encode_prompt, mean_loss
from records import read_stories
from sample import BEST_OF_TEMPERATURE, encode_request, generate_all, scores

RESAMPLES = 2000  # of the bootstrap
BEST_OF = 4  # from so many stories an instruction on, the best of them is judged, too


# ---- judging ----

TRAINED, NEW = "见过的词", "没见过的词"  # of the words of built-in rows: whether labels of training stories have them
CLAUSES = "摘要的分句"                 # those of a summary that stand in the story


def met(row, story, detect=None):
    """Which constraints of the row the story meets, as `constraints.outcomes`; a summary also by its clauses, the words
    also by "trained_words", if the row tells which of them these are."""
    checked = check(story, row["constraints"], row["rivals"], detect)
    by_name = outcomes(checked)
    if SUMMARY in by_name:
        by_name[CLAUSES] = clauses_told(row["constraints"][SUMMARY], story)
    if "trained_words" in row:
        for name, trained in ((TRAINED, True), (NEW, False)):
            results = [ok for word, ok in checked.get(WORDS, {}).items() if (word in row["trained_words"]) == trained]
            if results:
                by_name[name] = results
    return by_name


def interval(groups, seed):
    """groups: the outcomes of each instruction. -> {rate, lo, hi, n}: mean over instructions of their means, with the
    95% percentile bootstrap interval over instructions (Efron 1979)."""
    means = np.array([np.mean(g) for g in groups if len(g)], float)
    if not len(means):
        return {"rate": None, "lo": None, "hi": None, "n": 0}
    draws = np.random.default_rng(seed).integers(len(means), size=(RESAMPLES, len(means)))
    lo, hi = np.percentile(means[draws].mean(1), (2.5, 97.5))
    return {"rate": float(means.mean()), "lo": float(lo), "hi": float(hi), "n": len(means)}


def obedience(rows, stories, seed, detect=None):
    """stories[i]: those of rows[i]. -> {"satisfied": {number of constraints: all of them met}, "everything": the same,
    whatever their number, "by_kind": {constraint: met}, "unchecked_features": how many}. Rows with a feature that
    cannot be checked do not count in "satisfied" and "everything"."""
    by_number, by_kind, unchecked = defaultdict(list), defaultdict(list), 0
    for row, own in zip(rows, stories):
        results = [met(row, story, detect) for story in own]
        keys = [key for key in results[0] if key in KEYS]
        unknown = sum(f"{FEATURE} {name}" not in results[0] for name in row["constraints"].get(FEATURE, []))
        unchecked += unknown
        for name in results[0]:
            by_kind[name].append([ok for result in results for ok in result[name]])
        if keys and not unknown:
            by_number[len(keys)].append([all(result[key][0] for key in keys) for result in results])
    return {
        "satisfied": {str(k): interval(by_number[k], seed) for k in sorted(by_number)},
        "everything": interval([group for k in sorted(by_number) for group in by_number[k]], seed),
        "by_kind": {name: interval(groups, seed) for name, groups in by_kind.items()},
        "unchecked_features": unchecked,
    }


# ---- generating ----

def write_stories(model, tokenizer, instructions, samples, seed, sampling, quiet=True):
    """-> (a list of `samples` stories an instruction, the share of them that ended with EOS, their ids, in the same
    lists). Raises ValueError for an instruction that leaves no room for a story."""
    size, most = model.config.block_size, sampling["max_new_tokens"]
    prompts = [encode_request(tokenizer, "instruction", text, size) for text in instructions]
    continued = generate_all(model, prompts, tokenizer.eos_id, seed, sampling, quiet, samples)
    drawn = [continued[i:i + samples] for i in range(0, len(continued), samples)]
    ended = [len(ids) < min(most, size - len(prompt)) for prompt, some in zip(prompts, drawn) for ids in some]
    return [[tokenizer.decode(ids) for ids in some] for some in drawn], float(np.mean(ended)), drawn


def best_of(model, tokenizer, rows, drawn, max_new_tokens):
    """What `sample.py --best-of k` would show, for k = 1, 2, 4, … -> {k: [the best story of each k draws of a row]}."""
    samples = len(drawn[0])
    chosen = {2 ** i: [] for i in range(samples.bit_length())}
    for row, some in zip(rows, drawn):
        prompt = encode_prompt(tokenizer, render(row["constraints"]))
        score = scores(model, tokenizer, prompt, row["constraints"], some, max_new_tokens)
        for k, stories in chosen.items():
            groups = [range(i, i + k) for i in range(0, samples - k + 1, k)]
            stories.append([tokenizer.decode(some[max(group, key=score.__getitem__)]) for group in groups])
    return chosen


# ---- coherence and forgetting ----

def plain_loss(model, tokenizer, stories):
    """Loss of plain stories, nats per token: sum over all their tokens and EOS / number. An EOS stands before each."""
    size = model.config.block_size
    ids = [([tokenizer.eos_id] + tokenizer.encode(story) + [tokenizer.eos_id])[:size] for story in stories if story]
    return mean_loss(model, by_length([(row, row) for row in ids], 16))


def perplexity(model, tokenizer, stories):
    """-> a line on the loss of plain stories: per token, and per character, which other tokenizers can be compared by.
    A story counts as far as it fits into the context."""
    size = model.config.block_size
    ids = [(tokenizer.encode(story) + [tokenizer.eos_id])[:size - 1] for story in stories]
    tokens, characters = sum(map(len, ids)), sum(len(tokenizer.decode(row)) for row in ids)
    loss = plain_loss(model, tokenizer, stories)
    return (f"{len(stories)} stories, {tokens:,} tokens: {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}, "
            f"{loss * tokens / characters / math.log(2):.3f} bits per character")


def repetition(stories):
    """rep4: mean share of a story's character 4-grams that it has had before; distinct2, distinct3: distinct
    character n-grams / all, over all the stories together (Li et al. 2016)."""
    def grams(text, n):
        return [text[i:i + n] for i in range(len(text) - n + 1)]
    again = [1 - len(set(g)) / len(g) for g in (grams(s, 4) for s in stories) if g]
    found = {"rep4": float(np.mean(again)) if again else None}
    for n in (2, 3):
        every = [g for s in stories for g in grams(s, n)]
        found[f"distinct{n}"] = len(set(every)) / len(every) if every else None
    return found


def told_twice(story):
    """Does a sentence of six characters and more come again?"""
    told = [sentence for sentence in map(fold, sentences(story)) if len(sentence) >= 6]
    return len(set(told)) < len(told)


# ---- all of it ----

def evaluate(model, tokenizer, rows, base=None, plain=(), samples=2, seed=1337, temperature=0.2, top_p=0.9, top_k=30,
             max_new_tokens=400, detect=None, measure=None, progress=False, with_floor=True):
    """-> the dict of eval.json, without args. Raises ValueError if no row can be checked or a prompt leaves no room.

    rows: of `read_rows`. base: the untuned model with the same tokenizer, for gen_nll, base_nll and the floor. plain:
    held-out stories. detect(story) -> {feature: True or False}, for features that no rule can tell; measure(stories) ->
    a dict of further numbers. Losses are in nats per token. The same seed gives the same dict, but for the seconds that
    writing the model's stories, and choosing the best of them, took.
    """
    left_out, rows = len(rows), checkable(rows, detect)
    left_out -= len(rows)
    add_rivals(rows, seed)
    if not any(met(row, "", detect) for row in rows):
        raise ValueError("nothing that these instructions ask for can be checked")
    instructions = [render(row["constraints"]) for row in rows]
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_new_tokens": max_new_tokens}
    quiet = None if progress else True
    was_training = model.training
    start = time.perf_counter()
    written, eos_rate, drawn = write_stories(model.eval(), tokenizer, instructions, samples, seed, sampling, quiet)
    chosen = best_of(model, tokenizer, rows, drawn, max_new_tokens) if samples >= BEST_OF else {}
    seconds = time.perf_counter() - start
    floor = None
    if base is not None:
        base.eval()
        if with_floor:
            floor, *_ = write_stories(base, tokenizer, instructions, samples, seed, sampling, quiet)

    def compare(of):
        """The model beside ceiling and floor, on the rows of these numbers."""
        known = [rows[i] for i in of if rows[i]["story"]]
        return obedience([rows[i] for i in of], [written[i] for i in of], seed, detect) | {
            "ceiling": obedience(known, [[row["story"]] for row in known], seed, detect) if known else None,
            "floor": obedience([rows[i] for i in of], [floor[i] for i in of], seed, detect) if floor else None,
            "best_of": {str(k): obedience([rows[i] for i in of], [stories[i] for i in of], seed, detect)
                        for k, stories in chosen.items()}}

    sources = dict.fromkeys(row["source"] for row in rows if "source" in row)
    stories = [story for some in written for story in some]
    result = compare(range(len(rows))) | {
        "by_source": {source: compare([i for i, row in enumerate(rows) if row.get("source") == source])
                      for source in sources},
        "rows": len(rows), "left_out": left_out,
        "plain_nll": plain_loss(model, tokenizer, plain),
        "base_nll": plain_loss(base, tokenizer, plain) if base is not None else None,
        "gen_nll": plain_loss(base, tokenizer, stories) if base is not None else None,
        **repetition(stories),
        "eos_rate": eos_rate,
        "mean_chars": float(np.mean([len(story) for story in stories])),
        **(measure(stories) if measure else {}),
        "seed": seed,
        "seconds": seconds,
    }
    model.train(was_training)
    return result


def table(result):
    """The result as text: for each source of instructions the model with its interval, beside ceiling and floor."""
    def pad(text, width):
        return text + " " * (width - sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text))

    def cells(block, section, name):
        parts = [(part.get(section, {}) if section else part).get(name)
                 for part in (block, block["ceiling"] or {}, block["floor"] or {})]
        if not parts[0] or not parts[0]["n"]:
            return f"{'–':>5}" + " " * 32
        model, *others = [f"{part['rate']:.0%}" if part and part["n"] else "–" for part in parts]
        bounds = f"{model} [{parts[0]['lo'] * 100:3.0f},{parts[0]['hi'] * 100:4.0f}]"
        return f"{parts[0]['n']:5}{bounds:>16}{others[0]:>9}{others[1]:>7}"

    def best(source, k):
        met = blocks[source]["best_of"][k]
        rates = {name: met["by_kind"].get(name) for name in (WORDS, SENTENCE)} | {"everything": met["everything"]}
        return f"best of {k}, {source}: " + ", ".join(
            f"{name} {of['rate']:.0%} [{of['lo'] * 100:.0f}, {of['hi'] * 100:.0f}]" for name, of in rates.items()
            if of and of["n"])

    def number(name, form):
        return "–" if result[name] is None else format(result[name], form)

    sources = dict(result["by_source"])
    rare = sources.pop(RARE, None)
    blocks = sources or {f"{result['rows']} instructions": result}
    kinds = [WORDS, EACH_WORD, TRAINED, NEW, SENTENCE, SUMMARY, CLAUSES, *(f"{FEATURE} {name}" for name in FEATURES)]
    names = [("by_kind", kind, kind) for kind in kinds if kind in result["by_kind"]]
    names += [("satisfied", k, f"all of {k}") for k in result["satisfied"]]
    names += [(None, "everything", "everything")] if result["satisfied"] else []
    lines = [" " * 13 + "".join(f"{source:^40}" for source in blocks),
             "met".ljust(13) + "   ".join(f"{'n':>5}{'model':>16}{'ceiling':>9}{'floor':>7}" for _ in blocks)]
    lines += [pad(label, 13) + "   ".join(cells(block, section, name) for block in blocks.values())
              for section, name, label in names]
    return "\n".join(line.rstrip() for line in [
        *lines, "",
        *(best(source, k) for source in blocks for k in blocks[source]["best_of"]),
        f"left out: {result['left_out']} instructions with only features that no rule can tell; of \"all of k\" all "
        f"with any ({result['unchecked_features']})",
        *([f"words of rare characters, spelled in bytes: {rare['by_kind'][WORDS]['rate']:.0%} of "
           f"{rare['by_kind'][WORDS]['n']}"] if rare else []),
        f"stories: {number('mean_chars', '.0f')} characters, {number('eos_rate', '.1%')} end with EOS; repeated "
        f"4-grams {number('rep4', '.1%')}, distinct 2-grams {number('distinct2', '.1%')}; "
        f"{result['seconds']:.0f} s",
        f"nats per token: plain stories {number('plain_nll', '.3f')} (base {number('base_nll', '.3f')}), "
        f"its own stories under the base {number('gen_nll', '.3f')}"])


def parse_args(argv=None):
    parser = command_line("Does the model follow instructions, and can it still write?")
    parser.add_argument("--ckpt", type=to_path, help="model directory (default: out/sft, else the base model)")
    parser.add_argument("--adapter", type=to_path,
                        help="LoRA adapter directory, put on --ckpt (default there: the base)")
    parser.add_argument("--base", type=to_path,
                        help="the untuned model (default: the base that ships, if it has --ckpt's tokenizer)")
    parser.add_argument("--data", type=to_path, help="instruction records (default: handwritten and generated ones)")
    parser.add_argument("--text", type=to_path, metavar="FILE",
                        help="only the loss and perplexity of plain stories, in any format that pretrain.py reads")
    parser.add_argument("--encoding", type=codec, default="utf-8", help="of --data and --text (default: %(default)s)")
    parser.add_argument("--out", type=to_path, help="folder for eval.json (default: --adapter, else --ckpt)")
    parser.add_argument("--samples", type=count, default=2, metavar="N",
                        help=f"stories an instruction; from {BEST_OF} on also the best of 1, 2, 4, … of them, as "
                             "sample.py --best-of picks it (default: %(default)s)")
    parser.add_argument("--temperature", type=not_negative(float),
                        help=f"0 is argmax (default: 0.2; from {BEST_OF} samples on {BEST_OF_TEMPERATURE})")
    parser.add_argument("--seed", type=seed_number, default=1337, help="(default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    return parser.parse_args(argv)


def load_base(path, tokenizer):
    """--base. Without it the model that ships, or None where that is not there or has another tokenizer."""
    try:
        base, other = load_model(path or find_base())
        if other.identity != tokenizer.identity:
            raise ValueError(f"--base {path}: its tokenizer is not the model's")
        return base
    except ValueError:
        if path:
            raise
        return None


def main(argv=None):
    args = parse_args(argv)
    try:
        ckpt = find_model(args.ckpt, args.adapter)
        out = args.out or args.adapter or ckpt
        if args.text and (args.data or args.out or args.base):
            raise ValueError("--text goes without --data, --base and --out: it prints a line and writes nothing")
        if not args.text:
            if not (args.out or args.adapter) and not ckpt.is_dir():
                raise ValueError(f"--out: {ckpt} is no folder, where should eval.json go?")
            check_writable(out)  # before the work
        device = pick_device(args.device)
        model, tokenizer = load_model(ckpt, args.adapter)
        if args.text:
            stories = read_stories(args.text, args.encoding)
            return print(perplexity(model.to(device, torch.float32).eval(), tokenizer, stories))
        base = load_base(args.base, tokenizer)
        for some in filter(None, (model, base)):
            some.to(device, torch.float32)
        rows = read_rows(args.data, args.encoding) if args.data else builtin_rows()
        temperature = args.temperature
        if temperature is None:
            temperature = BEST_OF_TEMPERATURE if args.samples >= BEST_OF else 0.2
        result = evaluate(model, tokenizer, rows, base, builtin.plain_stories(), args.samples, args.seed, temperature,
                          progress=True)
        print(table(result))
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "eval.json", result | {
            "args": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}})
        print(out / "eval.json")
    except (ValueError, OSError) as e:
        fail(e)


if __name__ == "__main__":
    from evaluate import main
    main()
