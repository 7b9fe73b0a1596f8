"""Does it follow instructions, and can it still write? python evaluate.py --ckpt out/sft

One table, one figure (eval.png) and eval.json in --out. Stories are sampled for every instruction and judged by the
rules of constraints.py; beside the model stand the ceiling (the stories the instructions were made from, judged by the
same rules) and the floor (the untuned base). Every rate has a 95% bootstrap interval over instructions.

对话 is seen by a rule, the other features by the classifier of features.py, where it is good enough; a feature that
cannot be checked is left out of every conjunction, and counted.
"""
import argparse
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import lora
from checkpoint import find_base, find_model, load_model
from common import fail, not_negative, pick_device, write_atomic
from constraints import (
    FEATURE,
    FEATURES,
    KEY_OF,
    KEYS,
    LIST_KEYS,
    NEWLINE,
    SENTENCE,
    SUMMARY,
    WORDS,
    check,
    fold,
    parse,
    permutations,
    render,
    rouge_l,
    tells,
)
from dataset import by_length
from model import IGNORE
from records import read_records, read_stories, text_field
from sample import encode_request as encode
from sample import generate_all as continue_all
from study import features

HANDWRITTEN = Path(__file__).parent / "data" / "eval_instructions.jsonl"
BUILTIN, BUILTIN_SEED = 100, 99  # instructions of generated stories that stand beside the handwritten ones
PLAIN, PLAIN_SEED = 100, 98      # plain stories on which forgetting is measured
PRETRAINED = 5000                # texts of the base's pretraining in which memorised passages are looked for
RIVALS = 19                      # other summaries that a story is compared with
RESAMPLES = 2000                 # of the bootstrap
ORDER_ROWS, ORDERS = 8, 6        # instructions, and orders of each, that order_spread looks at


# ---- the instructions ----

# a line that means to be a constraint, 颜色：红, as 他说：“好！” does not
KEY_LIKE = re.compile(r"\s*(\w{1,12})\s*[：:]\s*[^\s“「『\"]")


def read_rows(path, checkable=FEATURES):
    """Instruction records -> [{"constraints", "story" or None}]. Raises ValueError naming file and row, also for a row
    with nothing that can be checked; checkable: the features that can be."""
    rows = []
    for number, record in read_records(path):
        where = f"{path}: row {number}"
        parts = [text_field(path, number, record, ["instruction"], required="constraints" not in record),
                 text_field(path, number, record, ["input"], required=False)]
        given = record.get("constraints")
        if given is not None and not isinstance(given, dict):
            raise ValueError(f"{where}: 'constraints' is {type(given).__name__}, not an object")
        for key, value in (given or {}).items():
            if key not in KEYS:
                raise ValueError(f"{where}: unknown constraint {key!r} (known: {'，'.join(KEYS)})")
            items = value if key in LIST_KEYS and isinstance(value, list) else [value]
            if (key in LIST_KEYS) != isinstance(value, list) or not all(isinstance(item, str) for item in items):
                raise ValueError(f"{where}: {key} is not a {'list of strings' if key in LIST_KEYS else 'string'}")
        for line in NEWLINE.split("\n".join(parts)) if not given else ():
            name = KEY_LIKE.match(line)
            if name and KEY_OF.get(name[1].lower()) not in KEYS:
                raise ValueError(f"{where}: unknown constraint {name[1]!r} (known: {'，'.join(KEYS)})")
        # one reading for both: what the prompt says is what is checked
        asked = {"constraints": render(given) if given else "\n".join(filter(None, parts))}
        constraints = parse(text_field(path, number, asked, ["constraints"], required=False))[0]
        if not constraints:
            raise ValueError(f"{where}: no constraints")
        for name in constraints.get(FEATURE, []):
            if name not in FEATURES:
                raise ValueError(f"{where}: unknown feature {name!r} (known: {'，'.join(FEATURES)})")
        if not any(set(value) & set(checkable) if key == FEATURE else fold("".join(value))
                   for key, value in constraints.items()):
            raise ValueError(f"{where}: no constraint that can be checked")
        story = text_field(path, number, record, ["output"], required=False)
        rows.append({"constraints": constraints, "story": story or None})
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def generated_rows(n, seed):
    """Instructions of n generated stories that are held out, with the story."""
    from data.generate import instructions, stories
    made = instructions(list(stories(n, seed, held_out=True)), seed)
    return [{"constraints": r["constraints"], "story": r["output"]} for r in made]


def builtin_rows():
    """The handwritten instructions, and those of generated stories, which have the story too."""
    return ([row | {"source": "handwritten"} for row in read_rows(HANDWRITTEN)]
            + [row | {"source": "generated"} for row in generated_rows(BUILTIN, BUILTIN_SEED)])


def builtin_training():
    """The stories of the default fine-tuning, and the first PRETRAINED texts of the base's pretraining."""
    import pretrain
    import train_sft
    from data import books
    return [record["output"] for record in train_sft.builtin_records()] + list(
        books.texts(PRETRAINED, pretrain.BUILTIN_SEED))


def add_rivals(rows, seed):
    """Give every row with a summary the 19 others it is told apart from: the same kind of protagonist first."""
    from data.generate import load
    lexicon, _ = load()
    cast = ("animal", "boy", "girl", "pet_name", "boy_name", "girl_name", "elder", "bird")
    kinds = {e["word"]: name.removesuffix("_name").replace("pet", "animal")
             for name in cast for e in lexicon[name]["entries"]}

    names = re.compile("|".join(map(re.escape, kinds)))
    summaries = sorted({row["constraints"][SUMMARY] for row in rows if SUMMARY in row["constraints"]})
    protagonist = {s: kinds[first[0]] if (first := names.search(s)) else "" for s in ["", *summaries]}
    for i, row in enumerate(rows):
        own = row["constraints"].get(SUMMARY, "")
        others = [s for s in summaries if s != own]
        random.Random(f"{seed}-{i}").shuffle(others)
        row["rivals"] = sorted(others, key=lambda s: protagonist[s] != protagonist[own])[:RIVALS]


# ---- judging ----

def verdicts(row, story, detect=None):
    """As constraints.check, with what only this file can tell: 摘要 among the row's rivals, the features that `detect`
    (story -> {feature: True or False}) knows. None where nothing can tell."""
    found = check(story, row["constraints"])
    if FEATURE in found and detect:
        seen = detect(story)
        found[FEATURE] = {name: seen.get(name) if ok is None else ok for name, ok in found[FEATURE].items()}
    if SUMMARY in found and row["rivals"]:
        found[SUMMARY] = tells(story, row["constraints"][SUMMARY], row["rivals"])
    return found


def judge(found):
    """`verdicts`, by kind: {词汇: all the words?, 特点: all that can be told?, …}; None where nothing can tell."""
    def whole(value):
        known = [ok for ok in value.values() if ok is not None]
        return all(known) if known else None
    return {key: whole(value) if key in LIST_KEYS else value for key, value in found.items()}


def interval(groups, seed):
    """groups: the outcomes of each instruction. -> {rate, lo, hi, n}: mean over instructions of their means, with the
    95% percentile bootstrap interval over instructions (Efron 1979)."""
    means = np.array([np.mean(g) for g in groups if len(g)], float)
    if not len(means):
        return {"rate": None, "lo": None, "hi": None, "n": 0}
    draws = np.random.default_rng(seed).integers(len(means), size=(RESAMPLES, len(means)))
    lo, hi = np.percentile(means[draws].mean(1), (2.5, 97.5))
    return {"rate": float(means.mean()), "lo": float(lo), "hi": float(hi), "n": len(means)}


def obedience(rows, told, seed, detect=None):
    """told[i]: the stories of rows[i]. -> satisfied, independent, by_kind, …; a row counts by its checkable kinds."""
    by_number, by_kind, alone = defaultdict(list), defaultdict(list), defaultdict(list)
    asked, unchecked = [], 0
    for row, stories in zip(rows, told):
        found = [verdicts(row, story, detect) for story in stories]
        judged = [judge(some) for some in found]
        kinds = [key for key in row["constraints"] if judged and judged[0][key] is not None]
        for name in row["constraints"].get(FEATURE, []):
            outcomes = [some[FEATURE][name] for some in found]
            if None in outcomes:
                unchecked += 1
            else:
                by_kind[f"特点 {name}"].append(outcomes)
        if kinds:
            by_number[len(kinds)].append([all(v[key] for key in kinds) for v in judged])
            asked.append(kinds)
        for key in kinds:
            outcomes = [v[key] for v in judged]
            by_kind[key].append(outcomes)
            if len(kinds) == 1:
                alone[key].append(outcomes)
            if key == WORDS:
                words = row["constraints"][WORDS]
                by_kind["每个词"].append([word in story for story in stories for word in words])
            if key == SENTENCE:
                sentence = row["constraints"][SENTENCE]
                by_kind["随机句子（宽松）"].append([rouge_l(sentence, story) >= 0.8 for story in stories])
            if key == SUMMARY:
                by_kind["摘要 ROUGE-L"].append([rouge_l(row["constraints"][SUMMARY], story) for story in stories])
    single = {key: np.mean([np.mean(g) for g in (alone[key] or groups)]) for key, groups in by_kind.items()}
    return {
        "satisfied": {str(k): interval(by_number[k], seed) for k in sorted(by_number)},
        "independent": {str(k): float(np.mean([np.prod([single[key] for key in kinds]) for kinds in asked
                                               if len(kinds) == k])) for k in sorted(by_number) if k > 1},
        "by_kind": {key: interval(groups, seed) for key, groups in by_kind.items()},
        "unchecked_features": unchecked,
    }


# ---- generating ----

def write_stories(model, tokenizer, instructions, samples, seed, sampling, quiet=True):
    """-> (a list of `samples` stories an instruction, the share of them that ended with EOS). Raises ValueError for an
    instruction that leaves no room for a story."""
    size, most = model.config.block_size, sampling["max_new_tokens"]
    prompts = [encode(tokenizer, "instruction", text, size) for text in instructions for _ in range(samples)]
    texts = continue_all(model, prompts, tokenizer.eos_id, seed, sampling, quiet)
    ended = [len(ids) < min(most, size - len(prompt)) for ids, prompt in zip(texts, prompts)]
    stories = [tokenizer.decode(ids) for ids in texts]
    return [stories[i:i + samples] for i in range(0, len(stories), samples)], float(np.mean(ended))


def order_spread(model, tokenizer, rows, seed, sampling, detect=None):
    """How far do the orders of the same constraints differ? Written greedily, so that all difference is the order's:
    the mean over instructions of (highest - lowest) share of constraints met. None without rows that can tell."""
    several = [row for row in rows if sum(v is not None for v in judge(verdicts(row, "", detect)).values()) > 1]
    spreads = []
    for row in several[::-(-len(several) // ORDER_ROWS) or 1]:
        orders = list(permutations(row["constraints"]))
        orders = orders[::-(-len(orders) // ORDERS)]
        told, _ = write_stories(model, tokenizer, [render(c) for c in orders], 1, seed, sampling | {"temperature": 0})
        met = [[ok for ok in judge(verdicts(row, story, detect)).values() if ok is not None] for [story] in told]
        shares = [np.mean(m) for m in met]
        spreads.append(max(shares) - min(shares))
    return float(np.mean(spreads)) if spreads else None


# ---- coherence, forgetting, memorisation ----

@torch.no_grad()
def plain_loss(model, tokenizer, stories):
    """Loss of plain stories, nats per token: sum over all their tokens and EOS / number. An EOS stands before each."""
    size = model.config.block_size
    ids = [([tokenizer.eos_id] + tokenizer.encode(story) + [tokenizer.eos_id])[:size] for story in stories if story]
    loss = n = 0
    device = model.lm_head.weight.device
    for x, y in by_length([(row, row) for row in ids], 16):
        loss += model(x.to(device), y.to(device)).item()
        n += (y != IGNORE).sum().item()
    return loss / n if n else None


@torch.no_grad()
def piece_losses(model, tokenizer, before, text):
    """{offset: nats}: the loss of each piece of the text that fits into the context, by the character at which it
    begins. before: the ids in front of it, at least one."""
    ids = tokenizer.encode(text)
    row = torch.tensor([(before + ids)[:model.config.block_size]], device=model.lm_head.weight.device)
    loss = F.cross_entropy(model(row[:, :-1])[0], row[0, 1:], reduction="none")[len(before) - 1:]
    # decoded from the beginning: a character may be several pieces, and one of them alone is no character
    return {len(tokenizer.decode(ids[:i])): nats for i, nats in enumerate(loss.tolist())}


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


class Grams:
    """Hashes of n-grams of texts, for any n: with S(k) = sum over j < k of c(j) B^j modulo 2^64, where c are the
    characters of all texts, the hash of the gram at i is (S(i + n) - S(i)) / B^i (Karp and Rabin 1987)."""

    BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse

    def __init__(self, texts):
        codes = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32).astype(np.uint64)
        lengths = np.array([len(text) for text in texts], np.int64)
        self.owner = np.repeat(np.arange(len(texts)), lengths)
        self.end = np.repeat(np.cumsum(lengths), lengths)  # of the text that a character belongs to
        powers, self.inverse = (np.cumprod(np.r_[np.uint64(1), np.full(len(codes), base, np.uint64)])
                                for base in (self.BASE, pow(self.BASE, -1, 1 << 64)))
        self.sums = np.r_[np.uint64(0), np.cumsum(codes * powers[:-1])]

    def at(self, start, n):
        """-> (those of the positions `start` at which n characters are left, the hashes of their n-grams)."""
        start = start[start + n <= self.end[start]]
        return start, (self.sums[start + n] - self.sums[start]) * self.inverse[start]


def isin(values, others):
    """np.isin, by bisection: the few are sorted, the many are not."""
    others = np.sort(others)
    found = np.searchsorted(others, values)
    return (found < len(others)) & (others[np.minimum(found, len(others) - 1)] == values) if len(others) else found < 0


def longest_common(stories, training):
    """For each story the length of its longest substring that some training story has too, found by bisection over n:
    are any of its n-grams among theirs? Where no n-gram is shared, no longer one need be looked for."""
    ours, theirs = Grams(stories), Grams(training)
    longest = np.zeros(len(stories), int)

    def bisect(which, lo, hi, start, theirs_start):  # their longest is at least lo and below hi; starts of shared grams
        if hi - lo == 1 or not len(which):
            longest[which] = lo
            return
        middle = (lo + hi) // 2
        a, a_hashes = ours.at(start[np.isin(ours.owner[start], which)], middle)
        b, b_hashes = theirs.at(theirs_start, middle)
        b_shared = isin(b_hashes, a_hashes)
        a_shared = isin(a_hashes, b_hashes[b_shared])
        has = np.isin(which, ours.owner[a[a_shared]])
        bisect(which[~has], lo, middle, start, theirs_start)
        bisect(which[has], middle, hi, a[a_shared], b[b_shared])

    bisect(np.arange(len(stories)), 0, max(map(len, stories), default=0) + 1, np.arange(len(ours.owner)),
           np.arange(len(theirs.owner)))
    return longest.tolist()


def highest_rouge2(stories, training):
    """For each story the highest ROUGE-2 precision against one training story: the share of its character 2-grams
    (each as often as both have it) that one of them has. By an index 2-gram -> training stories."""
    index = defaultdict(Counter)
    for i, text in enumerate(training):
        for j in range(len(text) - 1):
            index[text[j:j + 2]][i] += 1
    arrays = {gram: (np.array(list(c)), np.array(list(c.values()))) for gram, c in index.items()}
    highest = []
    for story in stories:
        shared = np.zeros(len(training))
        grams = Counter(story[j:j + 2] for j in range(len(story) - 1))
        for gram, count in grams.items():
            if gram in arrays:
                who, often = arrays[gram]
                shared[who] += np.minimum(often, count)
        highest.append(float(shared.max() / grams.total()) if grams and len(training) else 0.0)
    return highest


# ---- all of it ----

def evaluate(model, tokenizer, rows, base=None, plain=(), training=(), samples=2, seed=1337, temperature=0.2, top_p=0.9,
             top_k=30, guidance_scale=1.0, max_new_tokens=400, detect=None, progress=False, with_floor=True):
    """-> the dict of eval.json, without args.

    rows: of `read_rows`. base: the untuned model with the same tokenizer, for gen_nll, base_nll and the floor. plain:
    held-out stories. training: the stories that the model was trained on. detect: a features.Detector; without one only
    对话 is checked. Losses are in nats per token. The same seed gives the same dict.
    """
    add_rivals(rows, seed)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "guidance_scale": guidance_scale,
                "max_new_tokens": max_new_tokens}
    instructions = [render(row["constraints"]) for row in rows]
    was_training = model.training
    model.eval()
    quiet = None if progress else True
    told, eos_rate = write_stories(model, tokenizer, instructions, samples, seed, sampling, quiet)
    result, floor = obedience(rows, told, seed, detect) | {"by_source": {}}, None
    if base is not None:
        base.eval()
    if base is not None and with_floor:
        written, _ = write_stories(base, tokenizer, instructions, samples, seed, sampling, quiet)
        floor = obedience(rows, written, seed, detect)
    stories = [story for some in told for story in some]
    for source in sorted({row["source"] for row in rows if "source" in row}):
        part = [i for i, row in enumerate(rows) if row["source"] == source]
        result["by_source"][source] = obedience([rows[i] for i in part], [told[i] for i in part], seed, detect)
    result |= {
        "order_spread": order_spread(model, tokenizer, rows, seed, sampling, detect),
        "plain_nll": plain_loss(model, tokenizer, plain),
        "base_nll": plain_loss(base, tokenizer, plain) if base is not None else None,
        "gen_nll": plain_loss(base, tokenizer, stories) if base is not None else None,
        **repetition(stories),
        "eos_rate": eos_rate,
        "mean_chars": float(np.mean([len(story) for story in stories])),
        "lcs": float(np.mean(longest_common(stories, training))) if len(training) else None,
        "rouge2": float(np.mean(highest_rouge2(stories, training))) if len(training) else None,
    }
    known = [row for row in rows if row["story"]]
    result["ceiling"] = obedience(known, [[row["story"]] for row in known], seed, detect) if known else None
    result["floor"] = floor
    result["feature_auc"] = detect.auc if detect else {}
    result["seed"] = seed
    model.train(was_training)
    return result


def table(result):
    """The result as lines of text: model, ceiling and floor side by side."""
    def cell(part, name):
        found = (part or {}).get(name)
        if not found or found["rate"] is None:
            return f"{'–':>22}"
        return f"{found['rate']:7.1%} [{found['lo']:4.0%}, {found['hi']:4.0%}]".rjust(22)

    columns = [result, result["ceiling"] or {}, result["floor"] or {}]
    lines = [f"{'met':<20}{'n':>5}{'model':>22}{'ceiling':>22}{'floor':>22}{'if independent':>16}"]
    for section, label in (("by_kind", "{}"), ("satisfied", "all of {}")):
        for name in result[section]:
            independent = result["independent"].get(name) if section == "satisfied" else None
            title = label.format(name)
            lines.append(title + " " * (20 - sum(2 if ord(c) > 255 else 1 for c in title))
                         + f"{result[section][name]['n']:5}" + "".join(cell(c.get(section), name) for c in columns)
                         + (f"{independent:16.1%}" if independent is not None else ""))
    for source, part in result["by_source"].items():
        for section, label in (("by_kind", "{}"), ("satisfied", "all of {}")):
            lines += [f"{source + ',':<13}{label.format(name)}  n {found['n']}{cell(part[section], name)}"
                      for name, found in part[section].items()]
    aucs = "   ".join(f"{name} {value:.3f}" for name, value in result["feature_auc"].items())
    lines.append(f"AUC of the features' classifier, plots unseen: {aucs or '–'}")
    lines.append(f"features that cannot be checked (no rule, AUC below {features.CHECKABLE}): "
                 f"{result['unchecked_features']} (left out)")
    for names in (("order_spread", "eos_rate", "mean_chars"), ("rep4", "distinct2", "distinct3"),
                  ("plain_nll", "base_nll", "gen_nll"), ("lcs", "rouge2")):
        lines.append("   ".join(f"{name} " + ("–" if result[name] is None else f"{result[name]:.3f}")
                                for name in names))
    return "\n".join(lines)


def plot(result, path):
    """eval.png: share of stories that meet all of 1, 2, 3, 4 constraints."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    parts = [("model", result, "tab:blue", "o-"), ("ceiling", result["ceiling"], "tab:gray", "^--"),
             ("floor", result["floor"], "tab:orange", "s:")]
    for label, part, color, style in parts:
        if part and part["satisfied"]:
            at = [int(k) for k in part["satisfied"]]
            rate, lo, hi = (np.array([v[key] for v in part["satisfied"].values()]) for key in ("rate", "lo", "hi"))
            ax.errorbar(at, rate, yerr=np.abs([rate - lo, hi - rate]), fmt=style, color=color, capsize=3, label=label)
    if result["independent"]:
        ax.plot([int(k) for k in result["independent"]], list(result["independent"].values()), "x", color="black",
                label="model, were errors independent")
    ax.set(xlabel="checkable constraints in the instruction", ylabel="all met (share of stories)", ylim=(-0.03, 1.03),
           xticks=range(1, len(KEYS) + 1))
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Does the model follow instructions, and can it still write?")
    parser.error = fail
    parser.add_argument("--ckpt", type=Path, help="model directory (default: out/sft, else the base model)")
    parser.add_argument("--adapter", type=Path, help="LoRA adapter directory, put on --ckpt (default there: the base)")
    parser.add_argument("--base", type=Path, help="the untuned model (default: the base that ships, if it has --ckpt's "
                                                  "tokenizer)")
    parser.add_argument("--data", type=Path, help="instruction records (default: handwritten and generated ones)")
    parser.add_argument("--train-data", type=Path, help="stories that the model was trained on, for memorisation "
                                                        "(default: the built-in ones)")
    parser.add_argument("--out", type=Path, help="folder for eval.json and eval.png (default: --adapter, else "
                                                 "--ckpt)")
    parser.add_argument("--samples", type=int, default=2, help="stories an instruction (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 is argmax (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=not_negative(float), default=1.0,
                        help="above 1 the prompt counts for more (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1337, help="(default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    args = parser.parse_args(argv)
    if args.samples < 1:
        parser.error(f"--samples {args.samples} is below 1")
    if not args.temperature >= 0:
        parser.error(f"--temperature {args.temperature} is below 0")
    return args


def main(argv=None):
    args = parse_args(argv)
    from data.generate import stories
    try:
        ckpt, base_dir = find_model(args.ckpt, args.adapter), args.base or find_base()
        device = pick_device(args.device)
        model, tokenizer = load_model(ckpt)
        if args.adapter:
            lora.load(args.adapter, model)
        model.to(device, torch.float32)
        base = None
        if base_dir is not None:
            base, base_tokenizer = load_model(base_dir)
            base.to(device, torch.float32)
            if base_tokenizer.files["tokenizer.model"] != tokenizer.files["tokenizer.model"]:
                if args.base:
                    raise ValueError(f"--base {base_dir}: its tokenizer is not that of {ckpt}")
                base = None  # a model of another family: no floor, unless --base names its own
        detect = features.detector(progress=True)
        rows = read_rows(args.data, ["对话", *detect.checkable()]) if args.data else builtin_rows()
        training = read_stories(args.train_data) if args.train_data else builtin_training()
        out = args.out or args.adapter or ckpt
        out.mkdir(parents=True, exist_ok=True)
        plain = [record["text"] for record in stories(PLAIN, PLAIN_SEED)]
        result = evaluate(model, tokenizer, rows, base, plain, training, args.samples, args.seed, args.temperature,
                          guidance_scale=args.guidance_scale, detect=detect, progress=True)
    except (ValueError, OSError) as e:
        fail(e)
    result["args"] = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    write_atomic(out / "eval.json", lambda p: p.write_text(json.dumps(result, indent=2, ensure_ascii=False), "utf-8"))
    plot(result, out / "eval.png")
    print(table(result))
    print(f"{out / 'eval.json'}, {out / 'eval.png'}")


if __name__ == "__main__":
    from evaluate import main
    main()
