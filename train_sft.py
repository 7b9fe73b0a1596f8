"""Fine-tune a base model on story instructions, all parameters: python train_sft.py --lr 5e-4 --dtype bf16-mixed

Fine-tuning is pretraining with the prompt masked out of the loss. So there is one loop, `train`, for plain text
(pretrain.py) and for instruction pairs (here); they differ in the batches they hand it.
"""
import argparse
import functools
import json
import math
import shutil
import time
from pathlib import Path

import torch
from tqdm import tqdm

import lora
from checkpoint import WEIGHTS, find_base, load_last, load_model, save_last, save_model
from common import StopSignals, fail, fraction, not_negative, pick_device, pick_dtype, positive, write_atomic
from dataset import PairBatches, Replay, by_length, encode_pairs, encode_prompt, encode_stories, varied_prompts
from model import IGNORE
from records import read_instructions, read_stories, split_by_story
from sample import tell_cases


def get_lr(step, total, warmup, lr, min_lr, decay_rate=1.0):
    """Learning rate of step 1 … total: linear warm-up over `warmup` steps, then a cosine (Loshchilov and Hutter, arXiv
    1608.03983) from lr to min_lr. With decay_rate r it runs r times as fast and holds at min_lr afterwards; r = 1 ends
    exactly at the last step."""
    if step <= warmup:
        return lr * step / warmup
    progress = min(1.0, decay_rate * (step - warmup) / max(1, total - warmup))
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (lr - min_lr)


def backward(forward, micro_batches, precision, device):
    """Add the gradients of one optimizer step to .grad; return its loss, in nats per token: the sum over all its
    supervised tokens / their number. (A mean of the micro-batches' means would weigh tokens by their batch.)"""
    supervised = sum((y != IGNORE).sum().item() for _, y in micro_batches)
    loss = 0.0
    for x, y in micro_batches:
        with precision:
            part = forward(x.to(device), y.to(device)) / supervised
        part.backward()
        loss += part.item()
    return loss


def train(model, write, batches, val_batches, args, state=None, make_optimizer=torch.optim.AdamW):
    """Train what of `model` requires a gradient, in place, and keep the run directory args.out. Returns the best
    validation loss (None without one).

    batches(step) -> the micro-batches [(x, y)] of optimizer step 0, 1, …; both (B, T) int64, y IGNORE where nothing is
    supervised. val_batches: [(x, y)]. The loss is always the sum over supervised tokens / their number, over the whole
    optimizer step, in nats per token. write(directory) saves the weights. state: what `load_last` gives, to resume.
    Ctrl-C and SIGTERM save, then exit 130.
    Raises FloatingPointError when the loss is not finite; the last save stays.
    """
    out, device = args.out, pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    total = args.max_steps or math.ceil(args.epochs * batches.steps_per_epoch)
    warmup = args.warmup if args.warmup is not None else min(100, total // 10)
    min_lr = args.min_lr if args.min_lr is not None else args.lr / 10
    eval_every = args.eval_every or -(-total // 5)
    save_every = args.save_every or eval_every

    # bf16-true: weights and optimizer state in bfloat16. bf16-mixed: both in float32, bfloat16 inside autocast.
    model.to(device, torch.bfloat16 if dtype == "bf16-true" else torch.float32)
    precision = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16-mixed")
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]  # no decay on norm gains
    optimizer = make_optimizer(groups, lr=args.lr, betas=(args.beta1, args.beta2),
                               fused=device.type in ("cpu", "cuda", "mps", "xpu"))
    forward = torch.compile(model) if args.compile else model

    done, best = 0, None  # optimizer steps made; the best [validation loss, step] so far
    if state:
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        done, best = state["step"], state["best"]
    log = open_run(args, done)
    data = batches.fingerprint()

    def evaluate():
        """Validation loss of the weights as they are. The best so far become the model directory."""
        nonlocal best
        loss = n = 0
        model.eval()
        with torch.no_grad(), precision:
            for x, y in val_batches:
                loss += model(x.to(device), y.to(device)).item()
                n += (y != IGNORE).sum().item()
        model.train()
        if n:
            log(step=done, val_loss=loss / n)
            tqdm.write(f"step {done:5}: validation loss {loss / n:.4f}")
        if not n or best is None or loss / n < best[0]:
            best = [loss / n, done] if n else None
            write(out)

    def save():
        save_last(out, write, {"step": done, "total": total, "best": best, "data": data,
                               "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()})

    print(f"{out}: {sum(p.numel() for p in params):,} trainable parameters, {total} steps, {dtype} on {device}")
    model.train()
    if done == 0:
        save()  # first, so that no half-made run can pass for a finished one
        evaluate()
    with StopSignals() as stop, tqdm(total=total, initial=done, unit="step", dynamic_ncols=True) as bar:
        while done < total and not stop.requested:
            start = time.perf_counter()
            lr = get_lr(done + 1, total, warmup, args.lr, min_lr, args.decay_rate)
            for group in optimizer.param_groups:
                group["lr"] = lr
            micro_batches = batches(done)
            loss = backward(forward, micro_batches, precision, device)
            norm = torch.nn.utils.clip_grad_norm_(params, args.grad_clip or math.inf).item()
            if not (math.isfinite(loss) and math.isfinite(norm)):  # before the update: the weights are still good
                raise FloatingPointError(f"step {done + 1}: loss {loss}, gradient norm {norm}. The run stops; "
                                         f"{out / 'last'} holds the last good weights. A lower --lr may help")
            optimizer.step()
            optimizer.zero_grad()
            done += 1

            speed = sum(x.numel() for x, _ in micro_batches) / (time.perf_counter() - start)
            log(step=done, loss=loss, lr=lr, tokens_per_s=round(speed))
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()
            if done % eval_every == 0 or done == total:
                evaluate()
            if done % save_every == 0 or done == total or stop.requested:
                save()
    plot(out)
    if done < total:
        print(f"stopped after step {done} of {total} and saved; --resume --out {out} goes on")
        raise SystemExit(130)
    if best:
        print(f"best validation loss {best[0]:.4f} after step {best[1]}; the model is in {out}")
    return best and best[0]


# ---- the run directory ----

WEIGHTS_FILES = (WEIGHTS, lora.TENSORS)  # of a model, of an adapter

def check_out(args):
    """Before any work: refuse an output directory that holds a run, unless told what to do with it."""
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file, not a directory")
    holds_run = any((args.out / name).exists() for name in (*WEIGHTS_FILES, "last", "log.jsonl"))
    if holds_run and not (args.resume or args.overwrite):
        raise ValueError(f"--out {args.out} already holds a run or a model: --resume goes on, --overwrite starts anew")


def open_run(args, done):
    """Make args.out ready for step done + 1 and return log(**fields), which writes a line of log.jsonl."""
    out = args.out
    path = out / "log.jsonl"
    if done == 0:  # --overwrite: no file of the old run may pass for one of the new
        for name in ("last", "last.old", "last.new"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in (*WEIGHTS_FILES, "log.jsonl", "loss.png"):
            (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ONCE}
    write_atomic(out / "args.json", lambda p: p.write_text(json.dumps(settings, indent=2, ensure_ascii=False), "utf-8"))
    # what was logged after the last save is done again; a line that a crash cut short goes too
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= done]
    write_atomic(path, lambda p: p.write_text("".join(kept), encoding="utf-8"))

    def log(**fields):
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(fields) + "\n")
    return log


def smooth(values):
    """Exponential means over about 20 values, without the bias towards the start."""
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = 0.95 * mean + 0.05 * value, 0.95 * weight + 0.05
        means.append(mean / weight)
    return means


def plot(out):
    """loss.png from log.jsonl: the raw loss pale, smoothed on top, the validation points; below, the learning rate."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in open(out / "log.jsonl", encoding="utf-8")]
    steps = [(r["step"], r["loss"], r["lr"]) for r in rows if "loss" in r]
    points = [(r["step"], r["val_loss"]) for r in rows if "val_loss" in r]
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[3, 1], layout="constrained")
    if steps:
        at, loss, lr = zip(*steps)
        top.plot(at, loss, color="tab:blue", alpha=0.25, linewidth=1, label="training, each step")
        top.plot(at, smooth(loss), color="tab:blue", label="training, smoothed")
        bottom.plot(at, lr, color="tab:gray")
    if points:
        top.plot(*zip(*points), "o-", color="tab:orange", markersize=5, linewidth=1, label="validation")
    top.set_ylabel("loss (nats per token)")
    top.legend()
    top.grid(alpha=0.3)
    bottom.set(ylabel="learning rate", xlabel="optimizer step")
    bottom.grid(alpha=0.3)
    fig.suptitle(str(out))
    fig.savefig(out / "loss.png", dpi=120)
    plt.close(fig)


# ---- the command line ----

ONCE = ("resume", "overwrite")  # flags of one call, not settings of the run


def training_parser(description):
    """The flags of every trainer. Their defaults are those of fine-tuning."""
    parser = argparse.ArgumentParser(description=description)
    parser.error = fail
    flag = parser.add_argument
    # what goes in and out
    flag("--init", type=Path, help="model directory to start from")
    flag("--data", type=Path, help="JSONL or JSON file, or a directory with train.jsonl and val.jsonl "
                                   "(default: the built-in corpus)")
    flag("--val-data", type=Path, help="validation file (default: split off from --data)")
    flag("--val-fraction", type=fraction, default=0.05, help="share of the stories for validation; a story is on one "
                                                             "side with all its rows (default: %(default)s)")
    flag("--out", type=Path, default=Path("out/sft"), help="run directory (default: %(default)s)")
    flag("--resume", action="store_true", help="go on with the run in --out; its settings hold unless given anew")
    flag("--overwrite", action="store_true", help="replace the run in --out")
    # optimization
    flag("--lr", type=positive(float), default=5e-4, help="peak learning rate (default: %(default)s)")
    flag("--min-lr", type=not_negative(float), help="learning rate at the end (default: lr / 10)")
    flag("--warmup", type=not_negative(int), help="steps of linear warm-up (default: 100, at most a tenth of all)")
    flag("--decay-rate", type=positive(float), default=1.0,
         help="r: the cosine falls r times as fast, then holds (default: %(default)s)")
    flag("--epochs", type=positive(float),
         help="passes over the data (default: 3; 1 over built-in stories, of which there are always more)")
    flag("--max-steps", type=positive(int), help="optimizer steps, instead of --epochs")
    flag("--batch-size", type=positive(int), default=16, help="rows of a micro-batch (default: %(default)s)")
    flag("--grad-accum", type=positive(int), default=1, help="micro-batches of a step (default: %(default)s)")
    flag("--block-size", type=positive(int), help="longest row in tokens (default: the model's)")
    flag("--weight-decay", type=not_negative(float), default=0.0, help="on matrices only (default: %(default)s)")
    flag("--beta1", type=fraction, default=0.9, help="AdamW (default: %(default)s)")
    flag("--beta2", type=fraction, default=0.95, help="AdamW (default: %(default)s)")
    flag("--grad-clip", type=not_negative(float), default=1.0,
         help="largest gradient norm, 0 is off (default: %(default)s)")
    # bookkeeping
    flag("--eval-every", type=positive(int), help="steps between validations (default: a fifth of all)")
    flag("--save-every", type=positive(int), help="steps between saves of last/ (default: as --eval-every)")
    flag("--seed", type=not_negative(int), default=1337, help="(default: %(default)s)")
    # machine
    flag("--dtype", choices=["32-true", "bf16-true", "bf16-mixed"],
         help="(default: bf16-mixed on a GPU; 32-true on a CPU, where it is often the faster one)")
    flag("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    flag("--compile", action="store_true", help="torch.compile the model")
    return parser


def parse(parser, argv):
    """Parse; with --resume the settings of the run in --out take the place of the defaults."""
    args = parser.parse_args(argv)
    if args.resume:
        try:
            stored = json.loads((args.out / "args.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as e:
            fail(f"--resume: cannot read the settings of the run in {args.out}: {e}")
        parser.set_defaults(**stored)
        args = parser.parse_args(argv)
    return args


def sft_parser(description):
    """The flags of fine-tuning, of all parameters or of adapters."""
    parser = training_parser(description)
    parser.add_argument("--order", choices=["as-is", "sample"], default="as-is",
                        help="of the constraints: as they stand, or drawn anew in each epoch (default: %(default)s)")
    parser.add_argument("--drop", type=fraction, default=0.0, help="chance of each constraint to be left out, drawn "
                                                                   "anew in each epoch; one stays (default: 0)")
    parser.add_argument("--replay", type=fraction, default=0.0, help="add whole plain stories, as in pretraining: this "
                                                                     "share of all supervised tokens (default: 0)")
    parser.add_argument("--replay-data", type=Path, help="their file (default: the base's own pretraining texts)")
    return parser


def parse_args(argv=None):
    return parse(sft_parser("Fine-tune a base model on story instructions, all parameters."), argv)


def data_files(args):
    """--data and --val-data -> (training file, validation file or None)."""
    train_file, val_file = args.data, args.val_data
    if train_file.is_dir():
        if val_file is None and (train_file / "val.jsonl").is_file():
            val_file = train_file / "val.jsonl"
        train_file = train_file / "train.jsonl"
    return train_file, val_file


def load_pairs(args):
    """-> (train, val), lists of (instruction, output)."""
    if args.data is None:
        pairs = [(record["instruction"], record["output"]) for record in builtin_records()]
        return split_by_story(pairs, args.val_fraction, story=lambda pair: pair[1])
    train_file, val_file = data_files(args)
    if val_file:
        return read_instructions(train_file), read_instructions(val_file)
    return split_by_story(read_instructions(train_file), args.val_fraction, story=lambda pair: pair[1])


BUILTIN_STORIES, BUILTIN_SEED = 3000, 2  # fine-tuning's part of the built-in corpus; the base is trained on seed 1
BUILTIN_AUTHORED = 2  # instructions of each authored story


@functools.cache  # reproduce.py asks for them run after run
def builtin_records():
    """Instruction records of built-in stories. The authored ones come twice, under other constraints: 8% of the rows,
    for they are the only ones in a language that no grammar makes, and too few for more."""
    from data import generate
    told = [*generate.stories(BUILTIN_STORIES, BUILTIN_SEED), *generate.authored("train") * BUILTIN_AUTHORED]
    return list(generate.instructions(told, BUILTIN_SEED))


REPLAYED = 5000  # texts of the base's pretraining that --replay draws from


def load_replay(args, tokenizer):
    """-> the plain stories of --replay, encoded. Raises ValueError without any."""
    if args.replay_data:
        texts = read_stories(args.replay_data)
    elif args.data is None:
        import pretrain
        from data import books
        texts = books.texts(REPLAYED, pretrain.BUILTIN_SEED)
    else:
        raise ValueError("--replay with --data needs --replay-data, the plain stories of the base's pretraining")
    return encode_stories(tokenizer, texts, args.block_size, "replay")


def builtin_base():
    """The base model that ships. Raises ValueError if it is not there."""
    base = find_base()
    if base is None:
        raise ValueError("there is no base model in base/: name one with --init, or make one with pretrain.py")
    print(f"base model: {base}")
    return base


def load_batches(args, model, tokenizer, state):
    """-> (batches, validation batches) of the run; fills in the settings that hang on data and model."""
    args.epochs = args.epochs or (1.0 if args.data is None else 3.0)
    args.block_size = args.block_size or model.config.block_size
    if args.block_size > model.config.block_size:
        raise ValueError(f"--block-size {args.block_size} is beyond the model's {model.config.block_size}")
    pairs, val_pairs = load_pairs(args)
    rows = encode_pairs(tokenizer, pairs, args.block_size, "training")
    val_rows = encode_pairs(tokenizer, val_pairs, args.block_size, "validation")
    prompt = None
    if args.order == "sample" or args.drop:
        fitting = [i for i, _ in pairs if len(encode_prompt(tokenizer, i)) < args.block_size]
        prompt = varied_prompts(tokenizer, fitting, args.order == "sample", args.drop)
    batches = PairBatches(rows, args.batch_size, args.grad_accum, args.seed, prompt=prompt)
    if args.replay:
        batches = Replay(batches, load_replay(args, tokenizer), args.replay)
    if state and state["data"] != batches.fingerprint():
        raise ValueError(f"--resume: the data is not what {args.out} was trained on")
    return batches, by_length(val_rows, args.batch_size)


def main(argv=None, make_optimizer=torch.optim.AdamW):
    args = parse_args(argv)
    state = None
    try:
        check_out(args)
        device = pick_device(args.device)
        if args.resume:
            model, tokenizer, state = load_last(args.out)
        else:
            model, tokenizer = load_model(args.init or builtin_base())
        batches, val_batches = load_batches(args, model, tokenizer, state)
    except (ValueError, OSError) as e:
        fail(e)
    torch.manual_seed(args.seed)
    try:
        train(model, lambda directory: save_model(directory, model, tokenizer), batches, val_batches, args, state,
              make_optimizer)
    except FloatingPointError as e:
        raise SystemExit(f"train_sft.py: {e}") from None
    best, tokenizer = load_model(args.out)
    tell_cases(best.to(device, torch.float32).eval(), tokenizer)


if __name__ == "__main__":
    from train_sft import main
    main()
