"""The study's experiments, made again: python study/reproduce.py

Makes the runs that are not there yet (after Ctrl-C the same command goes on), then writes report.md, runs.csv and
figures to --out. Every finding of the study gets a verdict that follows from paired differences over seeds. What is
known of the finished runs is in results.jsonl: after `mkdir -p out/reproduce && cp docs/study/results.jsonl
out/reproduce/` those of the shipped report are not made again. What an experiment is: study/experiments.py.

    pip install -r study/requirements.txt
    python study/reproduce.py --quick             experiments 1 and 2, one seed, 60 steps
    python study/reproduce.py --only 1,4
    python study/reproduce.py lora-sweep          experiment 7: what LoRA needs to reach full fine-tuning
"""
import argparse
import csv
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import command_line, fail, has_bf16, lock, pick_device, positive, write_text  # noqa: E402

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from checkpoint import gpt_config, load_model  # noqa: E402
from dataset import collate, encode_pairs, next_token_loss  # noqa: E402
from model import PRESETS  # noqa: E402
from study import report  # noqa: E402
from study.experiments import EXPERIMENTS, collect  # noqa: E402
from study.findings import SEEDS  # noqa: E402
from study.runs import Lab, Run  # noqa: E402

MAIN_JOB = 381    # its steps: after 150 nothing copies yet
STUDY_BATCH = 32  # of --preset microstories


def work(lab, numbers, evaluate=True):
    """Do what is not done yet, one run after the other; evaluate=False: train only."""
    with tqdm(unit="run", dynamic_ncols=True) as bar:
        while True:
            jobs = {}  # (run, measurement) -> its first name
            for number in numbers:
                for name, seed, run, measurement in EXPERIMENTS[number].plan(lab):
                    jobs.setdefault((run, measurement if evaluate else None), f"{number}: {name}, seed {seed}")
            waiting = [job for job in jobs if not lab.is_done(*job)]
            bar.total, bar.n = len(jobs), len(jobs) - len(waiting)
            bar.refresh()
            if not waiting:
                return
            bar.set_postfix_str(jobs[waiting[0]])
            lab.make(*waiting[0])


def write_csv(path, everything):
    """runs.csv: a line a run and experiment."""
    columns = ["experiment", "key", "seed", "command", "base_loss", "loss", "seconds", "tokens_per_s", "unchanged",
               "middle", "loss_by_story", "val_loss", "plain_nll", "base_nll", "gen_nll", "rep4", "distinct2",
               "eos_rate", "lcs", "everything", "each_word", "sentence", "clauses", "all_of_1", "all_of_2", "all_of_3",
               "all_of_4", "orders_met", "orders_every", "orders_some"]
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, columns, extrasaction="ignore")
        writer.writeheader()
        for number, results in everything.items():
            for (name, seed), result in results.items():
                key = " ".join(map(str, name)) if isinstance(name, tuple) else name
                writer.writerow(result | {"experiment": number, "key": key, "seed": seed,
                                          "command": result["run"].command()})


def write_report(lab, numbers, command):
    everything = {number: collect(lab, number) for number in EXPERIMENTS if number in numbers}
    write_csv(lab.out / "runs.csv", everything)
    plans = {number: {run for _, _, run, _ in EXPERIMENTS[number].plan(lab)} for number in everything}
    planned = {run for runs in plans.values() for run in runs if isinstance(run, Run)}
    trained = [run for run in planned if lab.loss(run) is not None]
    lines = [lab.known[run.command()] for run in trained]
    machines = sorted({f"torch {line['training']['torch']}, {line['training']['device']}" for line in lines})
    sections, verdicts, seen = [], [], set()
    for number, results in everything.items():
        sections.append(f"## {number}. {EXPERIMENTS[number].title}")
        own = plans[number] - seen  # its own runs, not those that it shares with experiments before it
        seen |= own
        if own and not any(map(lab.result, own)):
            sections.append("Not run yet.")
            continue
        blocks, found = EXPERIMENTS[number].report(lab, results)
        sections += blocks
        verdicts += found
    blocks = [
        "# The study's experiments, made again",
        f"`{command}`: {len(trained)} of {len(planned)} runs of {lab.steps} steps from {lab.init.name}, "
        f"{lab.data or 'the built-in corpus'}; {'; '.join(machines)}; training took "
        f"{sum(line['training']['seconds'] for line in lines) / 3600:.1f} hours in all. Losses are in nats per token; "
        "in parentheses the least and the most of the seeds. All runs: [runs.csv](runs.csv).",
        f"Base: sha256 {lab.origin['base']}; data: {lab.data or 'the built-in corpus'}, {lab.origin['data']}; code: "
        f"commit {'; '.join(sorted({line['code'] for line in lines})) or 'none'}.",
        "## Verdicts",
        "Paired differences over seeds, with their 95% t interval; above 0 agrees with the finding. holds: the "
        "interval lies above 0 (of two that are alike within so many points: inside these); does not hold: below 0 "
        "(outside); undecided otherwise, or with fewer than three seeds. (ours): not of the study.",
        report.table(["finding", "measured", "mean and 95% interval", "n", "verdict"], [f.row() for f in verdicts]),
    ]
    write_text(lab.out / "report.md", "\n\n".join(blocks + sections) + "\n")


def numbers(text):
    chosen = [int(n) if n.strip().isdigit() else n for n in text.split(",")]
    unknown = [n for n in chosen if n not in EXPERIMENTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no experiment {unknown[0]} (there are: 0 to {max(EXPERIMENTS)})")
    return [n for n in EXPERIMENTS if n in chosen]


def parse_args(argv=None):
    parser = command_line("The study's experiments, made again: one command, one report.")
    flag = parser.add_argument
    flag("experiment", nargs="?", choices=["lora-sweep"], help="the same as --only 7")
    flag("--quick", action="store_true", help="experiments 1 and 2, one seed, 60 steps, losses only")
    flag("--only", type=numbers, help="these experiments, such as 1,4 (default: 0 to 9)")
    flag("--init", help="model directory to start from (default: the base that ships)")
    flag("--data", help="as train_sft.py's (default: the built-in corpus); with stories.jsonl in it for experiment 4")
    flag("--preset", choices=PRESETS, help="geometry of --init; microstories: with the study's batches of 32")
    flag("--yes", action="store_true", help="begin with --preset microstories on a CPU, too")
    flag("--out", type=Path, default=Path("out/reproduce"), help="(default: %(default)s)")
    flag("--steps", type=positive(int), help=f"optimizer steps of each run (default: {MAIN_JOB}; 60 with --quick)")
    flag("--no-evaluate", dest="evaluate", action="store_false", help="losses only")
    args = parser.parse_args(argv)
    if args.preset and not args.init:
        parser.error("--preset names the geometry of your own base: it needs --init")
    if sum(map(bool, (args.quick, args.only, args.experiment))) > 1:
        parser.error("--quick, --only and lora-sweep: choose one")
    args.only = args.only or ([7] if args.experiment else [1, 2] if args.quick else list(EXPERIMENTS))
    args.steps = args.steps or (60 if args.quick else MAIN_JOB)
    return args


def check_preset(preset, init):
    own = gpt_config(Path(init) / "config.json")
    for name in ("n_layer", "n_embd", "n_head", "head_size", "intermediate_size"):
        if getattr(PRESETS[preset], name) != getattr(own, name):
            raise ValueError(f"--preset {preset}: {init} has {name} {getattr(own, name)}, not "
                             f"{getattr(PRESETS[preset], name)}")


def hours_needed(lab, numbers):
    """A guess from a single step, for the training that is left as far as it is planned yet."""
    model, tokenizer = load_model(lab.init)
    rows = encode_pairs(tokenizer, lab.pairs[0][:STUDY_BATCH], model.config.block_size, "timing")
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16(torch.device("cpu"))):
        next_token_loss(model.float().train(), collate(rows))[0].backward()
    seconds = time.perf_counter() - start
    left = {run for n in numbers for _, _, run, _ in EXPERIMENTS[n].plan(lab)
            if isinstance(run, Run) and not lab.is_done(run, None)}
    return len(left) * lab.steps * seconds / 3600


def main(argv=None):
    args = parse_args(argv)
    command = " ".join(["python study/reproduce.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        if args.preset:
            check_preset(args.preset, args.init)
        lab = Lab(args.init, args.data, args.out, args.steps, SEEDS[:1] if args.quick else SEEDS,
                  ["--batch-size", STUDY_BATCH] if args.preset == "microstories" else [])
        lab.out.mkdir(parents=True, exist_ok=True)
        lock(lab.out)
        if args.preset == "microstories" and pick_device(None).type == "cpu" and not args.yes:
            raise ValueError(f"--preset microstories without a GPU: about {hours_needed(lab, args.only):,.0f} hours of "
                             "training here, and more for judging; --yes to begin")
        try:
            work(lab, args.only, args.evaluate and not args.quick)
        finally:  # also of what there is when it is interrupted
            write_report(lab, args.only, command)
    except (ValueError, OSError) as e:
        fail(e)
    print(f"{lab.out / 'report.md'}, {lab.out / 'runs.csv'}")


if __name__ == "__main__":
    from study.reproduce import main
    main()
