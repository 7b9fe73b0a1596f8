"""How much pretraining does copying need? python study/rehearsal.py

A base of 2, 5, 10 and 20 million tokens, and the one that ships, are fine-tuned a little, all alike. For each: how
surely the base itself copies names and things within a story, and what the lines 词汇 and 随机句子 do after
fine-tuning. Prints a table and draws out/rehearsal/rehearsal.png; what is there already is not made again.

The four bases are stages of one run at a constant learning rate, so that fine-tuning brings the fall to each of them
alike. The one that ships has had its own.
"""
import functools
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pretrain  # noqa: E402
from checkpoint import find_base, load_model  # noqa: E402
from common import command_line, fail, new_directory, write_json  # noqa: E402
from constraints import SENTENCE, WORDS  # noqa: E402
from data import builtin, generate  # noqa: E402
from data.judged import add_rivals, held_out_rows  # noqa: E402
from figures import save, subplots  # noqa: E402
from study.asked import SEED, measure  # noqa: E402
from study.card import copying  # noqa: E402
from study.runs import Lab, steps_made, train_in  # noqa: E402

STEP = 4 * 512  # tokens of a step of pretraining
STAGES = (977, 2441, 4883, 9766)  # steps
PRETRAINING = ("--dtype", "bf16-mixed", "--compile", "--min-lr", pretrain.SETTINGS["small"]["lr"],
               "--eval-every", STAGES[0])
STORIES = ("--n", 18_000, "--seed", builtin.SEEDS["fine-tuning"], "--slot-words", "--more-sentences")
FINE_TUNING, FINE_TUNING_STEPS = ("--compile", "--val-fraction", 0.01), 280
JUDGED = 400  # instructions


def bases(out):
    """Make the stages -> {tokens: model directory}, with the base that ships."""
    directories, run = {}, out / "base"
    for steps in STAGES:
        directories[steps * STEP] = stage = out / f"base_{steps}"
        if not stage.is_dir():
            if steps_made(run) > steps:
                raise ValueError(f"{stage} is missing, and {run} is beyond its step {steps}: delete {run}")
            if steps_made(run) < steps:
                train_in(run, pretrain.main, [*PRETRAINING, "--max-steps", steps])
            with new_directory(stage) as copy:
                shutil.copytree(run, copy, ignore=shutil.ignore_patterns("last", "tokens"), dirs_exist_ok=True)
    shipped = json.loads((find_base() / "corpus.json").read_text(encoding="utf-8"))
    return directories | {round(shipped["epochs"] * shipped["tokens"]): find_base()}


def fine_tuning_data(out):
    data = out / "sft.jsonl"
    if not data.is_file():
        generate.main([str(a) for a in (*STORIES, "--out", out / "stories.jsonl", "--instructions", data)])
    return data


@functools.cache
def judged():
    """Instructions of held-out word pairs with two constraints and more, as study/asked.py takes them."""
    rows = [row for row in held_out_rows(JUDGED) if len(row["constraints"]) > 1]
    add_rivals(rows, SEED)
    return rows


def results(tokens, base, data, out):
    """Fine-tune a base a little -> what is known of it then, kept in a file beside the run."""
    lab = Lab(base, data, out, FINE_TUNING_STEPS)
    run = lab.sft(5e-4, "bf16-mixed", SEED, *FINE_TUNING)
    lab.train(run)
    if lab.read(run, "copying") is None:
        model, tokenizer = load_model(base)
        known = {"tokens": tokens, "base": copying(model.float().eval(), tokenizer)}
        for key in (WORDS, SENTENCE):
            known[key] = measure(*lab.load(run), [row for row in judged() if key in row["constraints"]], key)
        write_json(lab.directory(run) / "copying.json", known)
    return lab.read(run, "copying")


def draw(measured, path):
    fig, (left, right) = subplots(1, 2, figsize=(10, 4))
    at = [row["tokens"] / 1e6 for row in measured]
    for key, name, color in ((WORDS, "word", "tab:blue"), (SENTENCE, "sentence", "tab:orange")):
        for side, style in (("with", "o-"), ("without", "o:")):
            left.plot(at, [100 * row[key][side] for row in measured], style, color=color,
                      label=f"{name}, {side} its line")
        right.plot(at, [row[key]["nats"][1] - row[key]["nats"][0] for row in measured], "o-", color=color,
                   label=f"{name}, after fine-tuning, by its line")
    right.plot(at, [row["base"]["first"] - row["base"]["again"] for row in measured], "o-", color="tab:gray",
               label="name or thing, base, by its first coming")
    left.set(ylabel="in the story (%)", ylim=0)
    right.set(ylabel="saved at the first piece (nats)", ylim=0)
    for ax in (left, right):
        ax.set(xlabel="tokens of pretraining (millions)", xscale="log", xticks=at, xticklabels=[f"{x:.0f}" for x in at])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend()
    save(fig, path)


def main(argv=None):
    parser = command_line("How much pretraining does copying need?")
    parser.add_argument("--out", type=Path, default=Path("out/rehearsal"), help="(default: out/rehearsal)")
    out = parser.parse_args(argv).out
    try:
        out.mkdir(parents=True, exist_ok=True)
        data = fine_tuning_data(out)
        measured = [results(tokens, base, data, out) for tokens, base in bases(out).items()]
    except (ValueError, OSError) as e:
        fail(e)
    n = {key: measured[0][key]["n"] for key in (WORDS, SENTENCE)}
    print(f"| tokens | base: names and things, first, again | each word: with its line, without ({n[WORDS]}) | nats "
          f"| sentence ({n[SENTENCE]}) | nats |\n|---|---|---|---|---|---|")
    for row in measured:
        lines = [f"{row[key]['with']:.0%}, {row[key]['without']:.0%} | {row[key]['nats'][0]:.2f}, "
                 f"{row[key]['nats'][1]:.2f}" for key in (WORDS, SENTENCE)]
        print(f"| {row['tokens'] / 1e6:.1f}M | {row['base']['first']:.2f}, {row['base']['again']:.2f} | "
              f"{' | '.join(lines)} |")
    draw(measured, out / "rehearsal.png")


if __name__ == "__main__":
    from study.rehearsal import main
    main()
