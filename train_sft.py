"""Fine-tune a base model on story instructions, all parameters: python train_sft.py --lr 5e-4 --dtype bf16-mixed

Fine-tuning is pretraining with the prompt masked out of the loss. So there is one loop, `train`, for plain text
(pretrain.py), for instruction pairs (here) and for adapters (lora.py); they differ in the batches they hand it. Another
loss (DPO, a policy gradient) is another `loss_fn`.
"""
import json
import math
import shutil
import time
from pathlib import Path

import common
from common import fail, fraction, not_negative, positive, rank, seed_number, to_path, world

import torch
from tqdm import tqdm

import dataset
import figures
import lora
from checkpoint import WEIGHTS, find_base, load_last, load_model, save_last, save_model
from data import builtin
from dataset import next_token_loss, total_loss
from records import read_instructions, read_stories, split_by_story
from sample import print_cases

# Adam's epsilon for embedding and head. The gradient of a piece that does not come is tiny and the same for all such
# pieces: less of it. At the usual 1e-8 Adam makes as large a step of it as of any other, so rare pieces end up in one
# place, and a model that copies mistakes one for another.
PIECES, PIECES_EPS = ("model.embed_tokens.weight", "lm_head.weight"), 1e-5


def get_lr(step, total, warmup, lr, min_lr, decay_rate=1.0):
    """Learning rate of step 1 … total: linear warm-up over `warmup` steps, then a cosine (Loshchilov and Hutter, arXiv
    1608.03983) from lr to min_lr. With decay_rate r it runs r times as fast and holds at min_lr afterwards; r = 1 ends
    exactly at the last step."""
    if step <= warmup:
        return lr * step / warmup
    progress = min(1.0, decay_rate * (step - warmup) / max(1, total - warmup))
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (lr - min_lr)


def adamw(model, lr=5e-4, weight_decay=0.0, betas=(0.9, 0.95), cls=torch.optim.AdamW, params=None):
    """AdamW (or another class with its arguments) over these parameters, by default all that require gradients."""
    params = [p for p in model.parameters() if p.requires_grad] if params is None else params
    names = {id(p): name for name, p in model.named_parameters()}
    pieces = [p for p in params if names[id(p)] in PIECES]
    others = [p for p in params if names[id(p)] not in PIECES]
    groups = [{"params": pieces, "weight_decay": weight_decay, "eps": PIECES_EPS},
              {"params": [p for p in others if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0}]  # no decay on norm gains
    return cls(groups, lr=lr, betas=betas, fused=params[0].device.type in ("cpu", "cuda", "mps", "xpu"))


def backward(model, micro_batches, loss_fn, params, precision):
    """Put the gradients of one optimizer step into .grad, those of its loss: the sum over all its supervised tokens,
    in all micro-batches and processes, / their number. (A mean of the micro-batches' means would weigh tokens by their
    batch.) -> (that loss, the number)."""
    loss, n = 0.0, 0
    for batch in micro_batches:
        with precision:
            part, count = loss_fn(model, batch)
        part.backward()
        loss, n = loss + part.detach(), n + count  # still on its device: no waiting here
    loss, n = common.sum_over_processes(loss, n)
    common.sum_gradients(params)
    for p in params:
        if p.grad is not None:
            p.grad /= n
    return loss / n, n


def compile_model(model):
    """torch.compile it: on a CPU block by block, as all are alike, so that there is one to compile, and as the rest is
    fast as it is; on a GPU the whole."""
    on_cpu = model.lm_head.weight.device.type == "cpu"
    for module in model.model.layers if on_cpu else [model]:
        module.compile()


def train(model, batches, val_batches, out, save, *, steps, lr=5e-4, min_lr=None, warmup=None, decay_rate=1.0,
          grad_clip=1.0, eval_every=None, save_every=None, dtype="32-true", compile=False, seed=1337,
          loss_fn=next_token_loss, optimizer=None, state=None, measured=dict, keep=0, tell=None,
          draw=figures.run_curves):
    """Train the parameters of `model` that require gradients, in place, and keep the run directory `out`. -> the best
    validation loss, None without one.

    batches(step) -> the micro-batches of optimizer step 0, 1, …; val_batches: a list of batches. What a batch is only
    loss_fn(model, batch) -> (summed loss, number of terms) knows; the loss is always sum / number over the whole step.
    save(directory) writes the weights: the best so far to out/, the newest to out/last/. The learning rate is
    `get_lr`'s (default: warm-up over 100 steps, at most a tenth of all; down to lr / 10). grad_clip: largest gradient
    norm, 0 is off. eval_every, save_every: in steps (default: a fifth of all); last/ is also saved every ten minutes.
    dtype: "bf16-mixed" runs loss_fn under autocast. optimizer: over these parameters (default: `adamw`). state: what
    `load_last` gives, to resume. seed: of what is drawn in a step (dropout). measured() -> what else the line of
    log.jsonl says of a step, or of a validation; tell(fields) hears the same; at the end draw(out) draws it. keep: of
    the saves of last/, so many more stay as out/step-…, without their state. Ctrl-C, SIGTERM and SIGHUP save, then exit
    130. Raises FloatingPointError when the loss is not finite, OSError when something cannot be written; the last save
    stays. ValueError when the log cannot be read, or the state is another optimizer's.
    """
    out = Path(out)
    warmup = min(100, steps // 10) if warmup is None else warmup
    min_lr = lr / 10 if min_lr is None else min_lr
    eval_every = eval_every or -(-steps // 5)
    save_every = save_every or eval_every
    params = [p for p in model.parameters() if p.requires_grad]
    device = params[0].device
    precision = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16-mixed")
    optimizer = optimizer or adamw(model, lr)
    common.keep_freed_memory()
    if compile:
        compile_model(model)

    done, best, saved = 0, None, time.monotonic()  # optimizer steps; the best [validation loss, step]; the last save
    if state:
        done, best = state["step"], state["best"]
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        try:
            optimizer.load_state_dict(state["optimizer"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError("the run was begun with another optimizer") from None
        for group, now in zip(optimizer.param_groups, settings):
            group.update(now)  # this call's settings, not those of the call that saved
    log = open_log(out, done, tell)

    def evaluate():
        """Validation loss of the weights as they are. The best so far become the model directory."""
        nonlocal best
        model.eval()
        with precision, torch.compiler.set_stance("force_eager"):  # other shapes, and too few to compile for
            loss, n = common.sum_over_processes(*total_loss(model, val_batches[rank()::world()], loss_fn))
        model.train()
        if n:
            more = measured()
            log(step=done, val_loss=loss / n, **more)
            tqdm.write(f"step {done:5}: validation loss {loss / n:.4f}" + named(more))
        if not n or best is None or loss / n < best[0]:
            best = [loss / n, done] if n else None
            if rank() == 0:
                save(out)

    def save_run():
        nonlocal saved
        saved = time.monotonic()
        if rank() == 0:
            save_last(out, save, {"step": done, "best": best, "optimizer": optimizer.state_dict()})
            if keep:
                with common.new_directory(out / f"step-{done:06}") as new:
                    save(new)
                for old in kept_steps(out)[:-keep]:
                    shutil.rmtree(old)

    print(f"{out}: {sum(p.numel() for p in params):,} trainable parameters, {steps} steps, {dtype} on {device}"
          + (f", {world()} processes" if world() > 1 else ""))
    model.train()
    stopping = False
    with common.StopSignals() as stop, tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True,
                                            disable=rank() > 0) as bar:
        if done == 0:
            save_run()  # first, so that no half-made run can pass for a finished one
            evaluate()
        while done < steps and not stopping:
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = get_lr(done + 1, steps, warmup, lr, min_lr, decay_rate) * group.get("lr_scale", 1)
            torch.manual_seed(((seed * 1_000_003 + done) * world() + rank()) % 2**63)
            loss, n = backward(model, batches(done), loss_fn, params, precision)
            norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf).item()
            if not (math.isfinite(loss) and math.isfinite(norm)):  # before the update: the weights are still good
                raise FloatingPointError(f"step {done + 1}: loss {loss}, gradient norm {norm}. The run stops; "
                                         f"{out / 'last'} holds the last good weights. A lower --lr may help")
            optimizer.step()
            optimizer.zero_grad()
            done += 1

            speed = n / (time.perf_counter() - start)  # supervised tokens, of all processes
            more = measured()
            log(step=done, loss=loss, lr=optimizer.param_groups[0]["lr"], tokens_per_s=round(speed), **more)
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s" + named(more), refresh=False)
            bar.update()
            if done % eval_every == 0 or done == steps:
                evaluate()
            stopping = common.sum_over_processes(stop.requested)[0] > 0  # all stop if one is asked to
            if done % save_every == 0 or done == steps or stopping or time.monotonic() - saved > SAVE_SECONDS:
                save_run()
    if rank() == 0:
        draw(out)
    if done < steps:
        print(f"stopped after step {done} of {steps} and saved; --resume --out {out} goes on")
        raise SystemExit(130)
    if best:
        print(f"best validation loss {best[0]:.4f} after step {best[1]}; the model is in {out}")
    return best and best[0]


def named(fields):
    """", reward 0.94, tokens 92": what `measured` told of, behind a loss."""
    return "".join(f", {name} {value:.3g}" for name, value in fields.items())


def kept_steps(out):
    """The folders of --keep, in the order of their steps."""
    return sorted(out.glob(KEPT))


def open_log(out, done, tell=None):
    """-> log(**fields), which writes a line of out/log.jsonl and calls tell(fields). What was logged after step `done`
    is done again and goes, as does a line that a crash cut short."""
    if rank() > 0:
        return lambda **fields: None
    path = out / "log.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() and done else []
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= done]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({e}); without it --resume goes on with the weights of last/") from None
    common.write_text(path, "".join(kept))

    def log(**fields):
        try:
            with open(path, "a", encoding="utf-8") as f:
                f.write(json.dumps(fields) + "\n")
        except OSError as e:
            raise OSError(f"cannot write to {path}: {e.strerror}") from None
        if tell:
            tell(fields)
    return log


# ---- around the loop: what the three training commands share ----

SAVE_SECONDS = 600  # between saves, at most
ONCE = ("resume", "overwrite", "log")  # flags of one call, not settings of the run
KEPT = "step-" + "[0-9]" * 6  # of --keep
# what a run, of a model or of an adapter, leaves behind; and what others' models consist of
WRITTEN = (WEIGHTS, "config.json", "generation_config.json", lora.TENSORS, lora.CONFIG, "tokenizer.model",
           "tokenizer.json", "tokenizer_config.json", "last", "last.old", "last.new", KEPT, "args.json", "log.jsonl",
           "eval.json", "loss.png", "rl.png", "tensorboard")
MODELS = "*.safetensors*", "*.bin*", "*config.json"


def training_parser(description):
    """The flags of every trainer. Their defaults are those of fine-tuning."""
    parser = common.command_line(description)
    flag = parser.add_argument
    # what goes in and out
    flag("--init", type=to_path, help="model directory to start from (default of fine-tuning: the base that ships)")
    flag("--data", type=to_path, help="file (docs/data.md), or a directory with train.jsonl and val.jsonl "
                                      "(default: the built-in corpus)")
    flag("--encoding", type=common.codec, default="utf-8", help="of the data files, say gb18030 (default: %(default)s)")
    flag("--val-data", type=to_path, help="validation file (default: split off from --data)")
    flag("--val-fraction", type=fraction, default=0.05, help="share of the stories for validation; a story is on one "
                                                             "side with all its rows (default: %(default)s)")
    flag("--out", type=to_path, default=Path("out/sft"), help="run directory (default: %(default)s)")
    flag("--resume", action="store_true", help="go on with the run in --out; its settings hold unless given again")
    flag("--overwrite", action="store_true", help="replace the run in --out")
    # optimization
    flag("--lr", type=positive(float), default=5e-4, help="peak learning rate (default: %(default)s)")
    flag("--min-lr", type=not_negative(float), help="learning rate at the end (default: lr / 10)")
    flag("--warmup", type=not_negative(int), help="steps of linear warm-up (default: 100, at most a tenth of all; in "
                                                  "pretraining the preset's, 200 or 1,000)")
    flag("--decay-rate", type=positive(float), default=1.0,
         help="r: the cosine falls r times as fast, then holds (default: %(default)s)")
    flag("--epochs", type=positive(float),
         help="passes over the data (default: 3; 1 in pretraining, and over built-in stories)")
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
    flag("--keep", type=not_negative(int), default=0, metavar="N",
         help="keep the last N saves as model directories out/step-… (default: %(default)s)")
    flag("--log", choices=common.LOGGERS, help="besides log.jsonl (pip install tensorboard, or wandb)")
    flag("--seed", type=seed_number, default=1337, help="(default: %(default)s)")
    # machine
    flag("--dtype", choices=["32-true", "bf16-true", "bf16-mixed"],
         help="(default: bf16-mixed on a GPU; 32-true on a CPU, where it is often the faster one)")
    flag("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    flag("--compile", action="store_true", help="torch.compile the model")
    return parser


def parse(parser, argv, fixed):
    """Parse. With --resume the settings of the run in --out take the place of the defaults; a flag given now beats
    them, or is refused if it is one of `fixed`, which no run can change."""
    args = parser.parse_args(argv)
    if not args.resume:
        return args
    try:
        stored = dict(json.loads((args.out / "args.json").read_text(encoding="utf-8")))
        if not is_run(args.out):
            raise ValueError("args.json is not that of a run")
    except (OSError, ValueError, TypeError) as e:
        fail(f"--resume: cannot read the settings of the run in {args.out}: {e}")
    default = object()  # argparse sets no default where the namespace has a value already
    given = parser.parse_args(argv, type(args)(**dict.fromkeys(vars(args), default)))
    given = {name: value for name, value in vars(given).items() if value is not default}
    before = vars(parser.parse_args(as_flags(parser, stored, args.out / "args.json")))
    parser.set_defaults(**before, **{name: value for name, value in stored.items() if name not in before})
    for name in (*fixed, "val_data"):  # another validation set has another best loss
        now, then = given.get(name, before[name]), before[name]
        if isinstance(now, Path) and then:
            now, then = now.resolve(), then.resolve()
        if now != then:
            fail(f"--{name.replace('_', '-')} {now} cannot change with --resume; the run in {args.out} has {then}")
    if "epochs" in given and "max_steps" not in given:
        parser.set_defaults(max_steps=None)
    return parser.parse_args(argv)


def as_flags(parser, stored, path):
    """The settings {name: value} of args.json as a command line, so that they are checked as flags are."""
    argv = []
    for action in parser._actions:
        value = stored.get(action.dest)
        if value is None or action.dest in ONCE:
            continue
        if action.nargs == 0:  # a switch
            if not isinstance(value, bool):
                fail(f"{path}: {action.dest} {value!r} is neither true nor false")
            argv += action.option_strings[:value]
        else:
            argv.append(f"{action.option_strings[-1]}={value}")
    return argv


def check_out(args):
    """Before any work. Refuse --val-data without --data, a learning rate that would rise, and an --out that cannot be
    written to, is in use by another run, holds something that is not a run, or holds a run while neither --resume nor
    --overwrite is given."""
    out = args.out
    if args.min_lr and args.min_lr > args.lr:
        raise ValueError(f"--min-lr {args.min_lr} is above --lr {args.lr}")
    if args.val_data and args.data is None:
        raise ValueError("--val-data goes with --data: the built-in corpus has a validation part of its own")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, not a directory")
    if rank() == 0 and out.is_dir():
        common.lock(out)
    for source in filter(None, (args.init, getattr(args, "adapter", None))):
        source = source.resolve()
        if out.resolve() in (source, source.parent if source.name in ("last", "last.old") else source):
            raise ValueError(f"--out {out} is the model that the run starts from")
    holds = [path.name for pattern in (*WRITTEN, *MODELS) for path in out.glob(pattern)]
    if holds and not args.resume and not is_run(out):
        raise ValueError(f"--out {out} holds {holds[0]} but was not made by a training run: it is never replaced")
    # a run that was stopped before its first save has settings and perhaps a log, and nothing to lose
    if set(holds) - {"args.json", "log.jsonl", "tensorboard", "last.new"} and not (args.resume or args.overwrite):
        raise ValueError(f"--out {out} already holds a run or a model: --resume goes on, --overwrite starts over")
    common.check_writable(out)


def is_run(out):
    """Was this folder written by a run of ours?"""
    try:
        return {"init", "lr", "out"} <= set(json.loads((out / "args.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return False


def start(args):
    """-> the device. From here on the processes of a torchrun know each other, and random numbers are the seed's."""
    device = common.pick_device(args.device)
    common.start_processes(device)
    torch.manual_seed(args.seed)
    return device


def pick_init(args):
    """--init, or the base that ships."""
    init = args.init or find_base()
    print(f"base model: {init}")
    return init


def run(args, model, batches, val_batches, save, state=None, make_optimizer=adamw, **of_train):
    """The training run that the flags describe; `train` has the parameters' meaning. make_optimizer: as `adamw`."""
    device = common.pick_device(args.device)
    dtype = common.pick_dtype(args.dtype, device)
    steps = args.max_steps or math.ceil(args.epochs * batches.steps_per_epoch)
    data = batches.fingerprint()
    if state and data != getattr(args, "fingerprint", None):
        fail(f"--resume: the data is not what {args.out} was trained on (or an older version made that run)")
    if state and steps <= state["step"]:
        fail(f"--resume: the run in {args.out} has made {state['step']} steps already, of {steps}: a larger "
             "--max-steps or --epochs goes on")
    args.fingerprint = data
    common.wait_for_all()  # all have looked at --out before the first one writes to it
    # bf16-true: weights and optimizer state in bfloat16. bf16-mixed: both in float32, bfloat16 inside autocast.
    model.to(device, torch.bfloat16 if dtype == "bf16-true" else torch.float32)
    try:
        tell = None
        if rank() == 0:
            settings = open_run(args, fresh=state is None)
            tell = common.logger(args.log, args.out, settings)
        train(model, batches, val_batches, args.out, save, steps=steps, lr=args.lr, min_lr=args.min_lr,
              warmup=args.warmup, decay_rate=args.decay_rate, grad_clip=args.grad_clip, eval_every=args.eval_every,
              save_every=args.save_every, dtype=dtype, compile=args.compile, seed=args.seed, keep=args.keep, tell=tell,
              optimizer=make_optimizer(model, args.lr, args.weight_decay, (args.beta1, args.beta2)), state=state,
              **of_train)
    except FloatingPointError as e:
        raise SystemExit(f"error: {e}" if rank() == 0 else 1) from None
    except ValueError as e:
        if state is None:
            raise
        fail(f"--resume: {args.out}: {e}")
    except OSError as e:
        last = args.out / "last"
        fail(f"{args.out}: {e}" + (f"; {last} holds the last good save" if last.exists() else ""))
    common.wait_for_all()  # the model is there for all of them


def open_run(args, fresh):
    """Make args.out ready and print the settings -> them. fresh: no file of an older run there (--overwrite) may pass
    for one of the new. Ends the command if another run has it, or has made it meanwhile."""
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    try:
        check_out(args)  # it is locked now, so nothing changes any more
    except (ValueError, OSError) as e:
        fail(e)
    if fresh:  # args.json goes last of all, when it is written anew: it says that the rest is a run's
        for old in {path for pattern in WRITTEN for path in out.glob(pattern)} - {out / "args.json"}:
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink(missing_ok=True)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ONCE}
    common.write_json(out / "args.json", settings)
    shown = {name: value for name, value in settings.items() if value is not None and name != "fingerprint"}
    print(", ".join(f"{name} {value}" for name, value in shown.items()))
    return settings


def show(out, device, *model):
    """Print the study's test cases, told by the best model of the run. model: what `load_model` takes."""
    try:
        best, tokenizer = load_model(*model)
    except (ValueError, OSError) as e:
        fail(f"{e}; the newest weights are in {out / 'last'}")
    print_cases(best.to(device, torch.float32).eval(), tokenizer)


# ---- the command: full-parameter fine-tuning ----

def sft_parser(description):
    """The flags of fine-tuning, of all parameters or of adapters."""
    parser = training_parser(description)
    parser.add_argument("--order", choices=["as-is", "sample"], default="as-is",
                        help="of the constraints: as they stand, or drawn anew in each epoch (default: %(default)s)")
    parser.add_argument("--drop", type=fraction, default=0.0, help="chance of each constraint to be left out, drawn "
                                                                   "anew in each epoch; one stays (default: 0)")
    parser.add_argument("--replay", type=common.number(float, lambda share: 0 <= share <= 0.95, "is outside [0, 0.95]"),
                        default=0.0, help="add whole plain stories, as in pretraining: this share of all supervised "
                                          "tokens (default: 0)")
    parser.add_argument("--replay-data", type=to_path, help="their file (default: the base's own pretraining texts)")
    return parser


def parse_args(argv=None):
    parser = sft_parser("Fine-tune a base model on story instructions, all parameters.")
    return parse(parser, argv, fixed=("init",))


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
        pairs = [(record["instruction"], record["output"]) for record in builtin.fine_tuning()]
    else:
        train_file, val_file = data_files(args)
        pairs = read_instructions(train_file, args.encoding)
        if val_file:
            return pairs, read_instructions(val_file, args.encoding)
    return split_by_story(pairs, args.val_fraction, story=lambda pair: pair[1])


def load_replay(args, tokenizer):
    """-> the plain stories of --replay, encoded. Raises ValueError without any."""
    if args.data and not args.replay_data:
        raise ValueError("--replay with --data needs --replay-data, the plain stories of the base's pretraining")
    texts = read_stories(args.replay_data, args.encoding) if args.replay_data else builtin.replayed()
    return dataset.encode_stories(tokenizer, texts, args.block_size, "replay")


def load_batches(args, model, tokenizer):
    """-> (batches, validation batches) of the run; fills in the settings that depend on data and model."""
    args.epochs = args.epochs or (1.0 if args.data is None else 3.0)
    set_block_size(args, model)
    pairs, val_pairs = load_pairs(args)
    rows = dataset.encode_pairs(tokenizer, pairs, args.block_size, "training")
    val_rows = dataset.encode_pairs(tokenizer, val_pairs, args.block_size, "validation")
    prompt = None
    if args.order == "sample" or args.drop:
        instructions = [instruction for instruction, _ in pairs]
        prompt = dataset.varied_prompts(tokenizer, instructions, args.block_size, args.order == "sample", args.drop)
    batches = dataset.PairBatches(rows, args.batch_size, args.grad_accum, args.seed, prompt, rank(), world())
    if args.replay_data and not args.replay:
        raise ValueError("--replay-data goes with --replay, the share of its tokens")
    if args.replay:
        batches = dataset.Replay(batches, load_replay(args, tokenizer), args.replay)
    return batches, dataset.by_length(val_rows, args.batch_size)


def set_block_size(args, model):
    args.block_size = args.block_size or model.config.block_size
    if args.block_size > model.config.block_size:
        raise ValueError(f"--block-size {args.block_size} is beyond the model's {model.config.block_size}")


def main(argv=None, make_optimizer=adamw):
    args = parse_args(argv)
    state = None
    try:
        check_out(args)
        device = start(args)
        if args.resume:
            model, tokenizer, state = load_last(args.out)
        else:
            args.init = pick_init(args)
            model, tokenizer = load_model(args.init)
        batches, val_batches = load_batches(args, model, tokenizer)
    except (ValueError, OSError) as e:
        fail(e)
    run(args, model, batches, val_batches, lambda directory: save_model(directory, model, tokenizer), state,
        make_optimizer)
    show(args.out, device, args.out)


if __name__ == "__main__":
    from train_sft import main
    main()
