"""Where is an asked sentence lost? python study/lost_sentence.py out/sft [more models] --data out/held/judged.jsonl

A story has the sentence that 随机句子 asks for only if it is of a plot that has this sentence, comes to the beat where
it stands (by its ending, or an optional beat), takes this one of the beat's phrasings, and the same words in it. A
story is written for every instruction with a sentence, and the first of these that fails is counted; separately for
instructions with 摘要, which gives the plot away, and without.
"""
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import load_model  # noqa: E402
from common import command_line, fail  # noqa: E402
from constraints import SENTENCE, SUMMARY, render  # noqa: E402
from data import generate  # noqa: E402
from data.judged import read_rows  # noqa: E402
from evaluate import write_stories  # noqa: E402
from study.asked import SAMPLING, SEED  # noqa: E402

PLOT, BEAT, PHRASING, WORDS, MET = "plot", "beat", "phrasing", "words", "met"
WORD = ".{1,9}?"  # what fills a slot


def pattern(parts):
    """A compiled phrasing (see generate.py) -> a regular expression."""
    regex = ""
    for part in parts:
        if isinstance(part, list):
            regex += f"(?:{'|'.join(pattern([p] if isinstance(p, str) else p) for p in part)})"
        else:
            regex += WORD if isinstance(part, generate.Slot) else re.escape(part)
    return regex


def all_phrasings(plots):
    """[(plot, number of a beat in it, number of a phrasing in that, its longest literal text, its pattern)]."""
    phrasings = []
    for plot in plots:
        beats = {id(beat): beat for ending in plot["endings"] for _, (_, beat) in ending["beats"]}  # endings share some
        for i, beat in enumerate(beats.values()):
            for j, parts in enumerate(beat):
                literal = max((part for part in parts if type(part) is str), key=len, default="")
                phrasings.append((plot["name"], i, j, literal, re.compile(pattern(parts))))
    return phrasings


def analysed(story, phrasings):
    """-> (the plot that most of the story is of, [(beat, phrasing, start, end)] of this plot in it), or (None, [])."""
    matches, length = [], Counter()
    for plot, beat, phrasing, literal, regex in phrasings:
        if len(literal) > 2 and literal in story and (match := regex.search(story)):
            matches.append((plot, beat, phrasing, *match.span()))
            length[plot] += len(match[0])
    plot = max(length, key=length.get, default=None)
    return plot, [rest for name, *rest in matches if name == plot]


def lost_at(sentence, own, story, phrasings):
    """What `story` misses first of the sentence, which is from the story `own`; MET if nothing, None if the sentence is
    of no phrasing that is known."""
    plot, matches = analysed(own, phrasings)
    begin, end = own.index(sentence), own.index(sentence) + len(sentence)
    shared, beat, phrasing = max(((min(stop, end) - max(start, begin), beat, phrasing)
                                  for beat, phrasing, start, stop in matches), default=(0, None, None))
    if shared <= 0:
        return None
    if sentence in story:
        return MET
    story_plot, matches = analysed(story, phrasings)
    taken = [other for number, other, *_ in matches if number == beat]
    return PLOT if story_plot != plot else BEAT if not taken else WORDS if phrasing in taken else PHRASING


def measure(model, tokenizer, rows, phrasings):
    """What is missed first in stories written for these rows, all of which have a sentence: {PLOT: share, ...}, and of
    how many; {} and 0 where no sentence is of the grammar."""
    stories, _ = write_stories(model, tokenizer, [render(row["constraints"]) for row in rows], 1, SEED, SAMPLING)
    lost = Counter(lost_at(row["constraints"][SENTENCE], row["story"], story, phrasings)
                   for row, [story] in zip(rows, stories))
    del lost[None]
    n = lost.total()
    return {step: lost[step] / n for step in (PLOT, BEAT, PHRASING, WORDS, MET) if n}, n


def main(argv=None):
    parser = command_line("Where is an asked sentence lost?")
    parser.add_argument("ckpt", type=Path, nargs="+", help="model directories")
    parser.add_argument("--data", type=Path, required=True, help="instructions of generated stories, with these")
    args = parser.parse_args(argv)
    try:
        rows = [row for row in read_rows(args.data)
                if SENTENCE in row["constraints"] and row["constraints"][SENTENCE] in (row["story"] or "")]
        if not rows:
            raise ValueError(f"{args.data}: no row with a sentence of its story")
        models = [load_model(path) for path in args.ckpt]
        phrasings = all_phrasings(generate.load()[1])
        for path, (model, tokenizer) in zip(args.ckpt, models):
            print(f"{path}: what is missed first")
            for name, there in (("without", False), ("with", True)):
                if some := [row for row in rows if (SUMMARY in row["constraints"]) is there]:
                    shares, n = measure(model.float().eval(), tokenizer, some, phrasings)
                    line = ", ".join(f"{step} {share:.0%}" for step, share in shares.items())
                    print(f"{name:>8} {SUMMARY}, n {n:3}: {line or 'no sentence of the grammar'}", flush=True)
    except (ValueError, OSError) as e:
        fail(e)


if __name__ == "__main__":
    from study.lost_sentence import main
    main()
