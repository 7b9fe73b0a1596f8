"""One training run, made once: it is found again by a hash of its arguments. reproduce.py and sweep.py run these.

Here are also the two optimizers that the experiments need and training does not.
"""
import contextlib
import functools
import hashlib
import io
import json
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import features
import torch

import evaluate
import lora
import pretrain
import train_sft
from checkpoint import WEIGHTS, find_base, load_last, load_model, save_model
from constraints import parse
from dataset import by_length, encode_pairs
from model import IGNORE
from sample import CASES, encode, pick_device

EMA_HORIZON = 0.1  # of the steps of a run
JUDGED, JUDGED_SEED = 100, 99  # instructions that a run is judged by, of generated stories that are held out


@dataclass(frozen=True)
class Run:
    """argv: a training command as a user would type it, without --out. optimizer: one of OPTIMIZERS."""
    argv: tuple
    optimizer: str = "AdamW"

    def command(self):
        return "python " + " ".join(self.argv) + ("" if self.optimizer == "AdamW" else f"  # {self.optimizer}")


@dataclass(frozen=True)
class Mix:
    """A model without training of its own: base + share x (tuned - base), or the moving average of a run's weights."""
    of: Run
    share: float | str  # a number, or "ema"


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
                p.copy_(stochastic_round(weight.addcdiv_(m.float(), size, value=-group["lr"] / (1 - beta1 ** t))))


def stochastic_round(x):
    """float32 -> bfloat16: up with a chance of the share that plain truncation would cut off."""
    bits = x.view(torch.int32)  # bfloat16 is the upper half of float32
    return ((bits + torch.randint_like(bits, 1 << 16)) & -(1 << 16)).view(torch.float32).bfloat16()


OPTIMIZERS = {"AdamW": Watched, "StochasticAdamW": StochasticAdamW}
PROGRAMS = {"train_sft.py": train_sft.main, "lora.py": lora.main, "pretrain.py": pretrain.main}


# ---- the laboratory ----

def digest(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class Lab:
    """Where runs are made and kept.

    init: model directory, None for the base that ships. data: as train_sft.py's --data, None for the built-in corpus.
    settings: flags of every fine-tuning. Raises ValueError without a base."""

    def __init__(self, init, data, out, steps, settings=()):
        self.init = Path(init) if init else find_base()
        if self.init is None:
            raise ValueError("there is no base model in base/: name one with --init")
        if not (self.init / WEIGHTS).is_file():
            raise ValueError(f"no model in {self.init}")
        self.data, self.out, self.steps = data, Path(out), steps
        self.settings = [*(["--init", init] if init else []), *settings]
        self.shipped = not init and not data
        self.base = hashlib.sha256((self.init / WEIGHTS).read_bytes()).hexdigest()  # runs from another base are others

    def directory(self, run):
        if isinstance(run, Mix):
            return self.directory(run.of) / "mixed" / str(run.share)
        parts = [list(run.argv), self.base] + ([] if run.optimizer == "AdamW" else [run.optimizer])
        return self.out / "runs" / digest(*parts)

    def sft(self, lr, dtype, seed, *more, program=("train_sft.py",), data=None, optimizer="AdamW"):
        """The Run of one fine-tuning; more: further flags, which may overrule."""
        data = data or self.data
        argv = [*program, *self.settings, "--lr", f"{lr:g}", "--seed", seed, "--max-steps", self.steps, "--eval-every",
                self.steps, "--dtype", dtype, *(["--data", data] if data else []), *more]
        return Run(tuple(str(a) for a in argv), optimizer)

    def result(self, run):
        """What is known of the run: {"loss", "base_loss", "seconds", …, "eval" if it was judged}; None before it."""
        directory = self.directory(run)
        result = {}
        if isinstance(run, Run):
            if not (directory / "done.json").is_file():
                return None
            result = json.loads((directory / "done.json").read_text(encoding="utf-8"))
        for name, path in (("eval", directory / "eval.json"), ("loss_by_story", directory / "loss_by_story.json")):
            if path.is_file():
                result[name] = json.loads(path.read_text(encoding="utf-8"))
        return result or None

    def is_done(self, run, after):
        """after: None, or the method that is called with the run behind its training."""
        result = self.result(run)
        asked = {None: None, self.judge: "eval", self.loss_by_story: "loss_by_story"}[after]
        failed = isinstance(run, Run) and result and result["loss"] is None
        return bool(result) and (asked is None or asked in result or failed)

    def log(self, run):
        """The lines of log.jsonl."""
        return [json.loads(line) for line in open(self.directory(run) / "model" / "log.jsonl", encoding="utf-8")]

    def train(self, run):
        """Make a run, or go on with it, or find it done -> its result; loss is None where training failed."""
        directory = self.directory(run)
        model = directory / "model"
        if not (directory / "done.json").is_file():
            directory.mkdir(parents=True, exist_ok=True)
            going_on = ["--resume"] if (model / "last").is_dir() else []
            more = {}
            if run.argv[0] == "train_sft.py":
                horizon = max(1.0, EMA_HORIZON * self.steps)
                more["make_optimizer"] = functools.partial(OPTIMIZERS[run.optimizer], horizon=horizon)
            start = time.perf_counter()
            failed = None
            with open(directory / "output.txt", "a", encoding="utf-8") as f, \
                    contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
                try:
                    PROGRAMS[run.argv[0]]([*run.argv[1:], "--out", str(model), *going_on], **more)
                except SystemExit as e:  # a string: the loss was not finite, which is a result
                    failed = e.code
                    if failed == 130:
                        raise
            if failed and not isinstance(failed, str):
                raise ValueError(f"{run.command()} ended with exit code {failed}; see {directory / 'output.txt'}")
            self.finish(run, directory, failed, time.perf_counter() - start)
        return self.result(run)

    def finish(self, run, directory, failed, seconds):
        """done.json, and the moving average; what only resuming needs goes."""
        model, log = directory / "model", self.log(run)
        losses = [row["val_loss"] for row in log if "val_loss" in row]
        result = {"argv": run.argv, "base_loss": losses[0], "loss": None if failed else losses[-1],
                  "seconds": round(seconds, 1), "torch": torch.__version__, "device": str(pick_device(None)),
                  "tokens_per_s": statistics.median([row["tokens_per_s"] for row in log if "lr" in row] or [0])}
        if run.argv[0] == "train_sft.py" and not failed:
            tuned, tokenizer, state = load_last(model)
            first = state["optimizer"]["param_groups"][0]
            if "counted" in first:
                result["unchanged"] = first["unchanged"] / first["counted"]
            averages = [state["optimizer"]["state"][i].get("ema") for i in range(len(state["optimizer"]["state"]))]
            if all(a is not None for a in averages):
                params = sorted(tuned.parameters(), key=lambda p: p.dim() < 2)  # as `train` groups them
                for p, average in zip(params, averages):
                    p.data = average
                save_model(directory / "ema", tuned, tokenizer)
        write_atomic(directory / "done.json", lambda p: p.write_text(json.dumps(result, ensure_ascii=False), "utf-8"))
        shutil.rmtree(model / "last")

    def load(self, run):
        """-> (model in float32, tokenizer) of a finished run or a mix of its weights."""
        if isinstance(run, Mix) and run.share == "ema":
            model, tokenizer = load_model(self.directory(run.of) / "ema")
        elif isinstance(run, Mix):
            (model, tokenizer), (base, _) = self.load(run.of), load_model(self.init)
            with torch.no_grad():
                for p, start in zip(model.parameters(), base.parameters()):
                    p.copy_(start.float().lerp(p, run.share))
        elif run.argv[0] == "lora.py":
            model, tokenizer = load_model(self.init)
            lora.load(self.directory(run) / "model", model.float())
        else:
            model, tokenizer = load_model(self.directory(run) / "model")
        return model.float().to(pick_device(None)).eval(), tokenizer

    # ---- judging ----

    @functools.cached_property
    def pairs(self):
        """(training, validation) of the experiments, lists of (instruction, output)."""
        argv = ["--data", self.data] if self.data else []
        return train_sft.load_pairs(train_sft.parse_args(argv))

    @functools.cached_property
    def yardstick(self):
        """What every model is judged by: instructions with their stories, plain stories, training stories, features."""
        detect = features.detector()
        training, validation = self.pairs
        if self.data:
            rows = [{"constraints": found, "story": story} for instruction, story in validation
                    if (found := parse(instruction)[0])][:JUDGED]
            return rows, [story for _, story in validation[:JUDGED]], [story for _, story in training], detect
        from data.generate import stories
        rows = evaluate.generated_rows(JUDGED, JUDGED_SEED)
        plain = [record["text"] for record in stories(evaluate.PLAIN, evaluate.PLAIN_SEED)]
        return rows, plain, evaluate.builtin_training(), detect

    def judge(self, run):
        """evaluate.py's measures of a model, one story an instruction, and the study's test cases -> eval.json."""
        path = self.directory(run) / "eval.json"
        if not path.is_file():
            rows, plain, training, detect = self.yardstick
            model, tokenizer = self.load(run)
            base, _ = load_model(self.init)
            base.to(pick_device(None), torch.float32)
            result = evaluate.evaluate(model, tokenizer, rows, base, plain, training, samples=1, detect=detect,
                                       with_floor=False)
            result["val_loss"] = self.loss(model, tokenizer, self.pairs[1])
            result["cases"] = [self.story(model, tokenizer, *case) for case in CASES]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, lambda p: p.write_text(json.dumps(result, ensure_ascii=False), "utf-8"))
        return self.result(run)

    def loss_by_story(self, run):
        """Validation loss on stories that no row of training comes from -> loss_by_story.json."""
        path = self.directory(run) / "loss_by_story.json"
        if not path.is_file():
            value = self.loss(*self.load(run), self.pairs[1])
            write_atomic(path, lambda p: p.write_text(json.dumps(value), encoding="utf-8"))

    def file(self, name, make):
        """The path of a data file of instruction pairs; make() -> the pairs, if it is not there yet."""
        path = self.out / "data" / f"{name}.jsonl"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({"instruction": i, "output": o}, ensure_ascii=False) + "\n" for i, o in make()]
            write_atomic(path, lambda p: p.write_text("".join(lines), encoding="utf-8"))
        return str(path)

    def story(self, model, tokenizer, kind, text, sampling, max_new_tokens=400):
        try:
            ids = encode(tokenizer, kind, text, model.config.block_size)
        except ValueError as e:  # a model of a very short context
            return f"({e})"
        [told] = model.generate([ids], max_new_tokens, eos_id=tokenizer.eos_id, seed=1337, **sampling)
        return tokenizer.decode(told)

    @torch.no_grad()
    def loss(self, model, tokenizer, pairs):
        """Loss of the stories of instruction pairs, nats per token."""
        with contextlib.redirect_stdout(io.StringIO()):
            rows = encode_pairs(tokenizer, pairs, model.config.block_size, "validation")
        device, total, n = model.lm_head.weight.device, 0.0, 0
        for x, y in by_length(rows, 16):
            total += model(x.to(device), y.to(device)).item()
            n += (y != IGNORE).sum().item()
        return total / n
