"""One training run, made once and found again by its command; and what a finished model is judged by.

Here are also the optimizers that the experiments need and training does not.
"""
import contextlib
import functools
import hashlib
import io
import json
import math
import random
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from common import pick_device, write_jsonl

import torch

import decoding
import lora
import pretrain
import train_sft
from checkpoint import WEIGHTS, find_base, find_last, load_last, load_model, save_model
from constraints import parse, permutations
from data import builtin, generate
from data.judged import add_rivals, held_out_rows
from dataset import by_length, encode_pairs, mean_loss
from evaluate import evaluate
from sample import CASES, encode_request
from study import combined, features, memorisation
from study.average import interpolate

RESULTS = "results.jsonl"
EMA_HORIZON = 0.1  # of the steps of a run
JUDGED = builtin.INSTRUCTIONS  # that every model is judged by
STORY_TOKENS = 400             # of a test case's story
ORDERED, ORDERS = 120, 6       # instructions that are given in several orders of their lines; how many at most


@dataclass(frozen=True)
class Run:
    """argv: a training command as a user would type it, without --out. optimizer: one of OPTIMIZERS. frozen:
    parameters whose names contain one of these are not trained."""
    argv: tuple
    optimizer: str = "AdamW"
    frozen: tuple = ()

    def steps(self):
        """How many optimizer steps it is to make, where the flags say it."""
        return int(self.argv[self.argv.index("--max-steps") + 1]) if "--max-steps" in self.argv else math.inf

    def command(self):
        return "python " + " ".join(self.argv) + ("" if self.optimizer == "AdamW" else f"  # {self.optimizer}") + (
            f"  # frozen: {', '.join(self.frozen)}" if self.frozen else "")


@dataclass(frozen=True)
class Mix:
    """A model without training of its own: base + share x (tuned - base), or the moving average of a run's weights."""
    of: Run
    share: float | str  # a number, or "ema"

    def command(self):
        return f"mix {self.share} of {self.of.command()}"


# ---- optimizers ----

class Watched(torch.optim.AdamW):
    """AdamW, which counts the weights that a step leaves exactly as they were, and keeps an exponential moving average
    of weights in float32 (Polyak and Juditsky 1992) over `horizon` steps. What it does to the weights is AdamW's."""

    def __init__(self, groups, horizon, **settings):
        super().__init__(groups, **settings)
        self.horizon = horizon

    @torch.no_grad()
    def step(self):
        params = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in params]
        self.update()
        first = self.param_groups[0]  # saved and loaded with the optimizer's state
        same = sum((p == old).sum().item() for p, old in zip(params, before)) / sum(p.numel() for p in params)
        first["unchanged"] = first.get("unchanged", 0.0) + same
        first["counted"] = first.get("counted", 0) + 1
        for p in params:
            if p.dtype == torch.float32:  # in bfloat16 an average would be lost to rounding
                self.state[p].setdefault("ema", p.clone()).lerp_(p, 1 / self.horizon)

    def update(self):
        super().step()


class StochasticAdamW(Watched):
    """AdamW whose weights are bfloat16 and are rounded up or down at random, with the chance that makes the mean come
    out right (Zamirai et al., arXiv 2010.06192), so that small updates are not lost. Memory: that of bf16-true."""

    def update(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                t, m, v = state["step"].item(), state["exp_avg"], state["exp_avg_sq"]
                m.lerp_(p.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                weight = p.float() * (1 - group["lr"] * group["weight_decay"])
                size = (v.float() / (1 - beta2 ** t)).sqrt_().add_(group["eps"])
                new = weight.addcdiv_(m.float(), size, value=-group["lr"] / (1 - beta1 ** t))
                self.store(p, new, state)

    def store(self, p, new, state):
        """new, float32 -> the bfloat16 weights p."""
        p.copy_(stochastic_round(new))


class KahanAdamW(StochasticAdamW):
    """AdamW whose weights are bfloat16, each with a second bfloat16 that keeps what rounding has cut off and adds it to
    the next step (Kahan 1965; Zamirai et al., arXiv 2010.06192). Memory: two bytes a weight more than bf16-true."""

    def store(self, p, new, state):
        if "cut_off" not in state:
            state["cut_off"] = torch.zeros_like(p)
        new += state["cut_off"]
        p.copy_(new)
        state["cut_off"].copy_(new - p)


def stochastic_round(x):
    """float32 -> bfloat16: up with a chance of the share that plain truncation would cut off."""
    bits = x.view(torch.int32)  # bfloat16 is the upper half of float32
    return ((bits + torch.randint_like(bits, 1 << 16)) & -(1 << 16)).view(torch.float32).bfloat16()


OPTIMIZERS = {"AdamW": Watched, "StochasticAdamW": StochasticAdamW, "KahanAdamW": KahanAdamW}
PROGRAMS = {"train_sft.py": train_sft.main, "lora.py": lora.main, "pretrain.py": pretrain.main}


# ---- the laboratory ----

ROOT = Path(__file__).resolve().parent.parent


def digest(content):
    return hashlib.sha256(content).hexdigest()[:16]


def origin_of(data):
    """What tells this data from other data. Raises OSError."""
    if not data:
        return f"generator version {generate.VERSION}"
    path = Path(data)
    return digest(b"".join(p.read_bytes() for p in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])))


def commit():
    """The commit of this checkout, and whether files differ from it."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    try:
        return (git("rev-parse", "--short", "HEAD") or "unknown") + (
            ", changed since" if git("status", "--porcelain", "--untracked-files=no") else "")
    except OSError:  # no git
        return "unknown"


def read_results(path, origin):
    """results.jsonl -> {command: line}. Raises ValueError for a broken line, and for one of another origin."""
    known = {}
    for number, line in enumerate(open(path, encoding="utf-8"), 1):
        try:
            row = json.loads(line)
            command = row["command"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: line {number} is no result") from None
        for what, own in origin.items():
            if row.get(what) != own:
                raise ValueError(f"{path}: line {number} is of another {what} ({row.get(what)}, now {own}): choose "
                                 "another --out")
        known[command] = row
    return known


def steps_made(out):
    """The step at which the run in this directory was last saved; 0 where nothing is."""
    try:
        return find_last(out)[1]["step"]
    except ValueError:
        return 0


def train_in(out, program, argv, **more):
    """Call a trainer's main, so that it goes on with what is saved in `out`, or begins anew."""
    program([*(str(a) for a in argv), "--out", str(out), "--resume" if steps_made(out) else "--overwrite"], **more)


class Lab:
    """Where runs are made and kept: models below out/runs, and in out/results.jsonl a line for each run that is done,
    {"command", "base", "data", "code", "training", and what was measured}. That file alone is enough to go on from on
    another machine, under the same --out, --init and --data. One process at a time.

    init: model directory, None for the base that ships. data: as train_sft.py's --data, None for the built-in corpus.
    seeds: a seed is an order of the data, the same for all runs that are compared. settings: flags of every
    fine-tuning. Raises ValueError without a base, and for results from another base or other data."""

    def __init__(self, init, data, out, steps, seeds=(), settings=()):
        self.init = Path(init) if init else find_base()
        if not (self.init / WEIGHTS).is_file():
            raise ValueError(f"no model in {self.init}")
        self.data, self.out, self.steps, self.seeds = data, Path(out), steps, seeds
        self.settings = [*(["--init", init] if init else []), *settings]
        self.shipped = not init and not data
        self.origin = {"base": digest((self.init / WEIGHTS).read_bytes()), "data": origin_of(data)}
        self.makers = {}  # path of what a command reads -> the function that makes it
        self.code = commit()
        self.results = self.out / RESULTS
        self.known = read_results(self.results, self.origin) if self.results.is_file() else {}  # by command

    def sft(self, lr, dtype, seed, *more, program=("train_sft.py",), data=None, optimizer="AdamW", frozen=()):
        """The Run of one fine-tuning; more: further flags, which may overrule."""
        data = data or self.data
        argv = [*program, *self.settings, "--lr", f"{lr:g}", "--seed", seed, "--max-steps", self.steps, "--eval-every",
                self.steps, "--dtype", dtype, *(["--data", data] if data else []), *more]
        return Run(tuple(str(a) for a in argv), optimizer, frozen)

    def directory(self, run):
        return self.out / "runs" / digest(json.dumps([run.command(), self.origin]).encode())

    def model(self, run):
        """The path of its model, for the command of another run, before which it is made."""
        path = self.directory(run) / "model"
        self.makers[path] = lambda: self.train(run)
        return path

    def read(self, run, name):
        """"training", or one of MEASUREMENTS, of the run; None if it is not there yet."""
        return self.known.get(run.command(), {}).get(name)

    def keep(self, run, name, value):
        row = self.known.setdefault(run.command(), {"command": run.command(), **self.origin, "code": self.code})
        row[name] = value
        write_jsonl(self.results, self.known.values())

    def result(self, run):
        """What is known of the run: {"loss", "base_loss", "seconds", … of its training, and by name what was measured};
        None before it is trained. loss is None where that failed."""
        row = self.known.get(run.command())
        return row and row.get("training", {}) | {name: row[name] for name in MEASUREMENTS if name in row}

    def loss(self, run):
        """The last validation loss of a Run: infinite where training failed, None before it."""
        training = self.read(run, "training")
        return training and (math.inf if training["loss"] is None else training["loss"])

    def log(self, run):
        """The lines of log.jsonl; none of a run that was made on another machine."""
        path = self.directory(run) / "model" / "log.jsonl"
        return [json.loads(line) for line in open(path, encoding="utf-8")] if path.is_file() else []

    def is_done(self, run, measurement):
        """measurement: one of MEASUREMENTS, or None for the training alone. A failed training is not measured."""
        loss = self.loss(run.of if isinstance(run, Mix) else run)
        if loss is None:
            return False
        return measurement is None or loss == math.inf or self.read(run, measurement) is not None

    def make(self, run, measurement):
        """Train, and measure, what is not there yet; a model that is on another machine is trained again."""
        if not self.is_done(run, measurement):
            self.train(run.of if isinstance(run, Mix) else run)
            if measurement and not self.is_done(run, measurement):
                self.keep(run, measurement, MEASUREMENTS[measurement](self, *self.load(run)))

    # ---- training ----

    def train(self, run):
        """Make a run, or go on with it, unless its model is there. That the loss is not finite is a result, too."""
        directory = self.directory(run)
        model, finished = directory / "model", directory / "finished"
        if self.loss(run) == math.inf or finished.exists() and self.loss(run) is not None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        for path in map(Path, run.argv):
            if path in self.makers:
                self.makers[path]()
        more = {}
        if run.argv[0] == "train_sft.py":
            more["make_optimizer"] = functools.partial(self.optimizer, run)
        failed, start = None, time.perf_counter()
        with open(directory / "output.txt", "a", encoding="utf-8") as f, \
                contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
            try:
                if steps_made(model) < run.steps():  # else only what comes behind the last step was interrupted
                    train_in(model, PROGRAMS[run.argv[0]], run.argv[1:], **more)
            except SystemExit as e:  # a string: the loss was not finite
                failed = e.code
                if failed == 130:
                    raise
        if failed and not isinstance(failed, str):
            raise ValueError(f"{run.command()} ended with exit code {failed}; see {directory / 'output.txt'}")
        self.finish(run, directory, failed, time.perf_counter() - start)

    def optimizer(self, run, model, *settings):
        """As train_sft's make_optimizer. What the run leaves as it is loses its requires_grad."""
        for name, p in model.named_parameters():
            p.requires_grad_(not any(part in name for part in run.frozen))
        cls = functools.partial(OPTIMIZERS[run.optimizer], horizon=max(1.0, EMA_HORIZON * self.steps))
        return train_sft.adamw(model, *settings, cls=cls)

    def finish(self, run, directory, failed, seconds):
        """The result, in place of all that is known of an earlier model of this run; and the moving average. What only
        resuming needs goes. "seconds" are those since the run was last interrupted."""
        model, log = directory / "model", self.log(run)
        losses = [row["val_loss"] for row in log if "val_loss" in row]
        result = {"base_loss": losses[0], "loss": None if failed else losses[-1],
                  "middle": None if failed else middle(log),
                  "seconds": round(seconds, 1), "torch": torch.__version__, "device": str(pick_device(None)),
                  "tokens_per_s": statistics.median([row["tokens_per_s"] for row in log if "lr" in row] or [0])}
        if run.argv[0] == "train_sft.py" and not failed:
            tuned, tokenizer, state = load_last(model)
            first = state["optimizer"]["param_groups"][0]
            if "counted" in first:
                result["unchanged"] = first["unchanged"] / first["counted"]
            averages = [state["optimizer"]["state"][i].get("ema") for i in range(len(state["optimizer"]["state"]))]
            if all(a is not None for a in averages):
                groups = self.optimizer(run, tuned).param_groups  # in the order of the saved state
                for p, average in zip((p for group in groups for p in group["params"]), averages, strict=True):
                    p.data = average
                save_model(directory / "ema", tuned, tokenizer)
        (directory / "finished").touch()
        self.known = {command: row for command, row in self.known.items() if not command.endswith(run.command())}
        self.keep(run, "training", result)
        shutil.rmtree(model / "last", ignore_errors=True)

    def load(self, run):
        """-> (model in float32, tokenizer) of a finished run or a mix of its weights."""
        if isinstance(run, Mix) and run.share == "ema":
            model, tokenizer = load_model(self.directory(run.of) / "ema")
        elif isinstance(run, Mix):
            model, tokenizer = load_model(self.init)
            interpolate(model, self.load(run.of)[0], run.share)
        elif run.argv[0] == "lora.py":
            inits = [path for flag, path in zip(run.argv, run.argv[1:]) if flag == "--init"]  # the last one counts
            model, tokenizer = load_model([self.init, *inits][-1], adapter=self.directory(run) / "model")
        else:
            model, tokenizer = load_model(self.directory(run) / "model")
        return model.float().to(pick_device(None)).eval(), tokenizer

    # ---- measuring ----

    @functools.cached_property
    def pairs(self):
        """(training, validation) of the experiments, lists of (instruction, output)."""
        return train_sft.load_pairs(train_sft.parse_args(["--data", self.data] if self.data else []))

    @functools.cached_property
    def yardstick(self):
        """What every model is judged by: instructions with their stories, plain stories, and what tells features and
        memorised passages."""
        training, validation = self.pairs
        if self.data:
            rows = [{"constraints": constraints, "story": story} for instruction, story in validation
                    if (constraints := parse(instruction)[0])][:JUDGED]
            plain, known = [story for _, story in validation[:JUDGED]], [story for _, story in training]
        else:
            rows, plain = held_out_rows(JUDGED), builtin.plain_stories()
            known = [*(r["output"] for r in builtin.fine_tuning()), *builtin.replayed()]
        return rows, plain, {"detect": features.detector(), "measure": memorisation.measure(known)}

    @functools.cached_property
    def with_several_constraints(self):
        """Of the yardstick's instructions those of which combined.py can tell."""
        rows = [dict(row) for row in self.yardstick[0]]
        add_rivals(rows, combined.SEED)
        return list(filter(combined.is_checked_whole, rows))

    def evaluation(self, model, tokenizer):
        """evaluate.py's measures, one story an instruction, the validation loss, and the study's test cases."""
        rows, plain, more = self.yardstick
        base = load_model(self.init)[0].to(pick_device(None), torch.float32)
        result = evaluate(model, tokenizer, rows, base, plain, samples=1, with_floor=False, **more)
        for beside in ("ceiling", "floor", "best_of", "by_source", "seconds"):
            del result[beside]  # the same for all models, or not asked for
        return result | {"val_loss": self.validation_loss(model, tokenizer),
                         "cases": [self.story(model, tokenizer, *case) for case in CASES]}

    def together_and_alone(self, model, tokenizer):
        """study/combined.py's table: {number of constraints, or kind: {"n", "together", "alone": shares that are met,
        "rate", "lo", "hi": of their difference}}."""
        rows = self.with_several_constraints
        return combined.summary(combined.measure([(model, tokenizer)], rows)) if rows else {}

    def in_every_order(self, model, tokenizer):
        """Instructions in several orders of their lines, one story each: {"n": instructions, "met": mean share of their
        orders that are met in full, "every", "some": shares of instructions that are in every order, in one at least}.
        """
        rng, variants = random.Random(combined.SEED), []
        for row in self.with_several_constraints[:ORDERED]:
            orders = list(permutations(row["constraints"]))
            variants.append([row | {"constraints": order} for order in rng.sample(orders, min(ORDERS, len(orders)))])
        if not variants:
            return {"n": 0}
        shares = iter(combined.met_shares(model, tokenizer, [row for some in variants for row in some]))
        met = [[next(shares)["all"] for _ in some] for some in variants]
        return {"n": len(met)} | {name: statistics.fmean(map(of, met)) for name, of in (
            ("met", statistics.fmean), ("every", min), ("some", max))}

    def validation_loss(self, model, tokenizer):
        """Nats per token, on stories that no row of training comes from."""
        with contextlib.redirect_stdout(io.StringIO()):
            rows = encode_pairs(tokenizer, self.pairs[1], model.config.block_size, "validation")
        return mean_loss(model, by_length(rows, 16))

    def story(self, model, tokenizer, kind, text, sampling):
        try:
            ids = encode_request(tokenizer, kind, text, model.config.block_size)
        except ValueError as e:  # a model of a very short context
            return f"({e})"
        [story] = decoding.generate(model, [ids], STORY_TOKENS, eos_id=tokenizer.eos_id, seed=1337, **sampling)
        return tokenizer.decode(story)

    def file(self, name, make):
        """The path of a data file of instruction pairs, which make() gives when the first run needs them."""
        path = self.out / "data" / f"{name}.jsonl"
        self.makers.setdefault(path, functools.cache(lambda: write_jsonl(path, (  # anew in each process, once
            {"instruction": instruction, "output": output} for instruction, output in make()))))
        return str(path)


def middle(log):
    """Mean training loss over the middle tenth of the steps, where schedules differ; seeds share the batches."""
    losses = [row["loss"] for row in log if "lr" in row]
    half, width = len(losses) // 2, max(1, len(losses) // 20)
    return statistics.fmean(losses[half - width:half + width]) if losses else None


MEASUREMENTS = {"eval": Lab.evaluation, "combined": Lab.together_and_alone, "orders": Lab.in_every_order,
                "loss_by_story": Lab.validation_loss}
