"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) on the weights of a model, kept in PEFT's format.

    add(model, ["q_proj", "v_proj"], r=8, alpha=16)     # freezes the model, puts trainable adapters on these Linears
    save(directory, model)                              # adapter_config.json, adapter_model.safetensors
    load(directory, model)                              # puts a saved adapter on its base
    plain = merged(model)                               # a model without adapters that computes the same

The base keeps its parameters and their names; an adapter is every key that contains `lora_`.
"""
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

from common import (
    command_line,
    fail,
    fraction,
    is_number,
    new_directory,
    number,
    positive,
    to_path,
    write_atomic,
    write_json,
)

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import GPT, PRESETS

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before the names of the base's modules
# PEFT's features that change what an adapter computes, or its base, and are not ours, with the values that leave them
# off. (Initial values such as PiSSA's are subtracted from the base's weights.)
OFF = {"bias": ("none",), "use_dora": (False,), "fan_in_fan_out": (False,), "rank_pattern": ({},),
       "alpha_pattern": ({},), "modules_to_save": ([],), "trainable_token_indices": ({}, []),
       "layer_replication": ([],), "lora_bias": (False,), "use_qalora": (False,), "target_parameters": ([],),
       "alora_invocation_tokens": ([],), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}


class Adapter(nn.Module):
    """What both kinds have. scaling: "lora", scale = alpha / r; "rslora", alpha / sqrt(r) (Kalajdzievski, arXiv
    2312.03732)."""

    def __init__(self, r, alpha, scaling, dropout):
        super().__init__()
        self.r, self.alpha, self.scaling = r, alpha, scaling
        self.scale = alpha / (r if scaling == "lora" else math.sqrt(r))
        self.lora_dropout = nn.Dropout(dropout)


class LoRALinear(Adapter):
    """y = x Wᵀ + bias + scale · (x Aᵀ) Bᵀ, with W the Linear's own, frozen. A (r, in) starts random, B (out, r) at 0.
    """

    def __init__(self, linear, r, alpha, scaling="lora", dropout=0.0):
        super().__init__(r, alpha, scaling, dropout)
        linear.requires_grad_(False)
        self.weight, self.bias = linear.weight, linear.bias  # only Qwen2's have a bias
        like = {"bias": False, "device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Linear(linear.in_features, r, **like)  # kaiming_uniform(a=sqrt(5)), as PEFT's
        self.lora_B = nn.Linear(r, linear.out_features, **like)
        nn.init.zeros_(self.lora_B.weight)

    def factors(self, x):
        """x (..., in) -> x, W, a, B with y = x Wᵀ + a Bᵀ: (..., in), (out, in), (..., r), (out, r)."""
        return x, self.weight, self.scale * self.lora_A(self.lora_dropout(x)), self.lora_B.weight

    def forward(self, x):  # (..., in) -> (..., out)
        x, weight, low, b = self.factors(x)
        y = F.linear(x, weight, self.bias)
        # addmm adds while it multiplies: low @ Bᵀ would be another tensor as large as y, written, read and added
        return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), b.T).view_as(y)

    def delta(self):
        """What the adapter adds to the weight: (out, in), in float32."""
        return self.scale * self.lora_B.weight.float() @ self.lora_A.weight.float()


class LoRAEmbedding(Adapter):
    """y = W[x] + scale · B A[:, x], with W the Embedding's own, frozen. A (r, V) starts at 0, B (C, r) random, as small
    as a Linear's lora_A: PEFT's standard normal would make the steps sqrt(3 C) times as large. Nothing is dropped."""

    def __init__(self, embedding, r, alpha, scaling="lora", dropout=0.0):
        super().__init__(r, alpha, scaling, dropout)
        self.weight = embedding.weight.requires_grad_(False)
        V, C = self.weight.shape
        self.lora_embedding_A = nn.Parameter(self.weight.new_zeros(r, V))
        self.lora_embedding_B = nn.Parameter(self.weight.new_empty(C, r).uniform_(-(C ** -0.5), C ** -0.5))

    def forward(self, idx):  # (B, T) -> (B, T, C)
        low = F.embedding(idx, self.lora_embedding_A.T)  # (B, T, r)
        return F.embedding(idx, self.weight) + self.scale * low @ self.lora_embedding_B.T

    def delta(self):
        """What the adapter adds to the weight: (V, C), in float32."""
        return self.scale * (self.lora_embedding_B.float() @ self.lora_embedding_A.float()).T


ADAPTED = {nn.Linear: LoRALinear, nn.Embedding: LoRAEmbedding}


def adapters(model):
    """-> {name of the module: LoRALinear or LoRAEmbedding}"""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def own_parameters(module):
    """-> {name within it, as in PEFT's files: parameter} of what an adapter adds."""
    return {name: p for name, p in module.named_parameters() if "lora_" in name}


def add(model, targets, r, alpha, scaling="lora", dropout=0.0):
    """Freeze the model; put an adapter on every Linear or Embedding whose name, or the end of it, is one of `targets`.

    Raises ValueError for a target that matches nothing, r or alpha that are not positive, r above both dimensions.
    """
    if r < 1 or not alpha > 0:
        raise ValueError(f"LoRA needs r of at least 1 and a positive alpha, not r {r}, alpha {alpha}")
    if scaling not in ("lora", "rslora"):
        raise ValueError(f"unknown scaling {scaling!r} (known: lora, rslora)")
    modules = {name: module for name, module in model.named_modules() if type(module) in ADAPTED}
    chosen = {}
    for target in targets:
        found = {name: module for name, module in modules.items() if f".{name}".endswith(f".{target}")}
        if not found:
            known = sorted({name.rsplit(".", 1)[-1] for name in modules})
            raise ValueError(f"target {target!r} matches nothing of the model (there are: {', '.join(known)})")
        chosen |= found
    for name, module in chosen.items():
        if r > max(module.weight.shape):
            raise ValueError(f"r {r} is above both dimensions of {name}, {tuple(module.weight.shape)}")
    model.requires_grad_(False)
    for name, module in chosen.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, ADAPTED[type(module)](module, r, alpha, scaling, dropout))


# ---- files ----

def fingerprints(model):
    """{name: a hash of the values} of the base's weights, so that an adapter can tell whether it has its own base."""
    return {name: hashlib.blake2b(p.detach().float().cpu().numpy().tobytes(), digest_size=8).hexdigest()
            for name, p in model.named_parameters() if "lora_" not in name}


def save(directory, model, base="", base_fingerprints=None):
    """Write an adapter directory. base: where the base model is, for PEFT's users. base_fingerprints: those of the base
    as it was loaded, if its precision has been changed since."""
    directory, parts = Path(directory), adapters(model)
    one = next(iter(parts.values()))
    if base:  # a folder, which is to be found from any other, or a name on the hub
        base = str(Path(base).resolve()) if Path(base).is_dir() else Path(base).as_posix()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": one.r,
              "lora_alpha": one.alpha, "lora_dropout": one.lora_dropout.p, "use_rslora": one.scaling == "rslora",
              "target_modules": sorted({name.rsplit(".", 1)[-1] for name in parts}), "bias": "none",
              "fan_in_fan_out": False, "inference_mode": True}
    tensors = {f"{PREFIX}{name}.{part}": p.detach().cpu().contiguous()
               for name, module in parts.items() for part, p in own_parameters(module).items()}
    # one entry only: safetensors writes several in an order that changes from run to run
    metadata = {"base": json.dumps(base_fingerprints or fingerprints(model))}
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / CONFIG, config)
    write_atomic(directory / TENSORS, lambda p: save_file(tensors, p, metadata=metadata))


def load(directory, model, scale=1.0):
    """Put a saved adapter (ours or PEFT's) on its base; scale: how much of it, 0 is the base alone.

    Raises ValueError naming what is missing, not supported, or does not fit the model.
    """
    directory = Path(directory)
    for name in (CONFIG, TENSORS):
        if not (directory / name).is_file():
            raise ValueError(f"{directory}: no adapter directory ({name} is missing)")
    if adapters(model):
        raise ValueError(f"{directory}: the model has an adapter already")
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        kind, r, alpha = config["peft_type"], config["r"], config["lora_alpha"]
        dropout, rslora = config.get("lora_dropout") or 0.0, config.get("use_rslora") or False
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{directory / CONFIG}: not the configuration of an adapter ({e})") from None
    unknown = [f"{key} {config[key]!r}" for key, off in OFF.items() if config.get(key) not in (None, *off)]
    for key, value, good in (("r", r, type(r) is int and r > 0),
                             ("lora_alpha", alpha, is_number(alpha) and 0 < alpha <= 1e30),  # finite in float32
                             ("lora_dropout", dropout, is_number(dropout) and 0 <= dropout < 1),
                             ("use_rslora", rslora, isinstance(rslora, bool))):
        if not good:
            raise ValueError(f"{directory / CONFIG}: {key} {value!r} is not valid")
    if kind != "LORA" or unknown:
        raise ValueError(f"{directory / CONFIG}: {unknown[0] if unknown else kind} is not supported (plain LoRA is)")
    try:
        with safe_open(directory / TENSORS, "pt") as f:
            tensors = {key.removeprefix(PREFIX): f.get_tensor(key) for key in f.keys()}
            base = dict(json.loads((f.metadata() or {}).get("base", "{}")))
    except (SafetensorError, ValueError, TypeError) as e:
        raise ValueError(f"{directory / TENSORS}: not a safetensors file of an adapter ({e})") from None

    own = fingerprints(model) if base else {}
    for name, digest in base.items():
        if own.get(name) != digest:
            raise ValueError(f"{directory}: made for another base model ({name} has other values)")
    weights = model.state_dict()
    for name in [name for name in tensors if name.endswith(".base_layer.weight")]:  # PEFT stores an adapted head's, too
        weight = weights.get(name.replace(".base_layer.", "."))
        tensor = tensors.pop(name)
        if weight is None or weight.shape != tensor.shape or not torch.equal(weight.to(tensor.dtype), tensor):
            raise ValueError(f"{directory / TENSORS}: {name} is not the weight of this base model")
    targets = [key.rpartition(".lora_")[0] for key in tensors if key.endswith((".lora_A.weight", ".lora_embedding_A"))]
    if not targets:
        raise ValueError(f"{directory / TENSORS}: has no adapter")
    add(model, targets, r, alpha, "rslora" if rslora else "lora", dropout)
    own = {f"{name}.{part}": p for name, module in adapters(model).items()
           for part, p in own_parameters(module).items()}
    if set(tensors) != set(own):
        raise ValueError(f"{directory / TENSORS}: not the pairs A, B of an adapter")
    for name, p in own.items():
        if tensors[name].shape != p.shape:
            raise ValueError(f"{directory}: {name} is {tuple(tensors[name].shape)}, but the base model asks for "
                             f"{tuple(p.shape)}")
        if problem := not_weights(tensors[name]):
            raise ValueError(f"{directory / TENSORS}: {name} {problem}")
        p.data = tensors[name]  # in the precision of the file, whatever the base's
    for module in adapters(model).values():
        module.scale *= scale


def not_weights(tensor):
    """What is wrong with a tensor of a file as weights of a model; "" if nothing is."""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"is {str(tensor.dtype).removeprefix('torch.')}"
    return "" if tensor.float().isfinite().all() else "has NaN or infinite values"


def merged(model):
    """A plain GPT that computes what the adapted model computes; merged in float32, the model stays as it is.

    An adapter on one of a tied head and embedding changes only that one, so merging unties them.
    """
    parts = adapters(model)
    tied = model.config.tie_embeddings and not {"lm_head", "model.embed_tokens"} & parts.keys()
    with torch.device("meta"):
        plain = GPT(replace(model.config, tie_embeddings=tied))
    weights = {name: p.detach().clone() for name, p in model.state_dict().items() if "lora_" not in name}
    for name, module in parts.items():
        weight = module.weight.detach()
        weights[f"{name}.weight"] = (weight.float() + module.delta().detach()).to(weight.dtype)
    plain.load_state_dict(weights, assign=True)
    if tied:
        plain.lm_head.weight = plain.model.embed_tokens.weight
    return plain


# ---- the command: python lora.py --r 8 --alpha 16, python lora.py merge ADAPTER --init DIR --out DIR ----

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
TARGETS = {"attention": ATTENTION, "mlp": MLP, "all-linear": ATTENTION + MLP, "study": [*ATTENTION, "lm_head"]}


def parse_args(argv=None):
    from train_sft import parse, sft_parser
    parser = sft_parser("Fine-tune low-rank adapters on a base model, with the loop, data and flags of train_sft.py. "
                        "(python lora.py merge --help: an adapter and its base into one model.)")
    flag = parser.add_argument
    flag("--r", type=positive(int), default=8, help="rank (default: %(default)s)")
    flag("--alpha", type=number(float, lambda alpha: 0 < alpha <= 1e30, "is not a positive number up to 1e30"),
         help="what an adapter adds is multiplied by alpha / r (default: 2r)")
    # a base that never read the prompt's keys cannot tell them apart: its embedding learns to (docs/study/README.md)
    flag("--targets", default="all-linear,embed_tokens",
         help=f"names of weights (q_proj,v_proj), or {', '.join(TARGETS)} (default: %(default)s)")
    flag("--scaling", choices=["lora", "rslora"], default="lora",
         help="rslora: alpha / sqrt(r) instead of alpha / r (default: %(default)s)")
    flag("--dropout", type=fraction, default=0.0,
         help="on what goes into an adapter of a Linear (default: %(default)s)")
    flag("--dry-run", action="store_true", help="only count the parameters")
    flag("--preset", choices=PRESETS, help="with --dry-run: of a new model of this geometry, without a base")
    parser.set_defaults(out=Path("out/lora"), lr=2e-3)  # low ranks want more than full fine-tuning's 5e-4
    args = parse(parser, argv, fixed=("init", "r", "alpha", "targets", "scaling", "dropout"))
    args.alpha = args.alpha or 2.0 * args.r
    return args


def add_from_args(model, args):
    """Put the adapters that the flags ask for on the model and print what they are."""
    alpha = int(args.alpha) if args.alpha.is_integer() else args.alpha
    targets = [name for target in args.targets.split(",") for name in TARGETS.get(target, [target])]
    add(model, targets, args.r, alpha, args.scaling, args.dropout)
    names = dict.fromkeys(name.rsplit(".", 1)[-1] for name in adapters(model))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    print(f"adapters of rank {args.r} on {len(adapters(model))} weights ({', '.join(names)}): "
          f"{trainable:,} trainable parameters of {total:,} ({trainable / total:.2%})")


def main(argv=None):
    import sys

    import train_sft  # the command alone calls the loop: everything above is a library
    from checkpoint import find_last, load_model, resuming, save_tokenizer
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["merge"]:
        return merge(argv[1:])
    args = parse_args(argv)
    state = None
    try:
        if args.preset:
            if not args.dry_run:
                raise ValueError("--preset is for --dry-run: adapters are trained on a trained base")
            with torch.device("meta"):
                return add_from_args(GPT(PRESETS[args.preset]), args)
        if not args.dry_run:
            train_sft.check_out(args)
        device = train_sft.start(args)
        args.init = train_sft.pick_init(args)
        model, tokenizer = load_model(args.init)
        base = fingerprints(model)
        model.float()  # adapters start in full precision; `run` chooses the one they are trained in
        if args.dry_run:
            return add_from_args(model, args)
        if args.resume:
            last, state = find_last(args.out)
            with resuming(args.out):
                load(last, model)
        else:
            add_from_args(model, args)
        batches, val_batches = train_sft.load_batches(args, model, tokenizer)
    except (ValueError, OSError) as e:
        fail(e)

    def save_all(directory):
        save(directory, model, args.init, base)
        save_tokenizer(directory, tokenizer)
    train_sft.run(args, model, batches, val_batches, save_all, state)
    train_sft.show(args.out, device, args.init, args.out)


def merge(argv):
    from checkpoint import load_model, save_model
    parser = command_line("An adapter and its base into one plain model.", prog="lora.py merge")
    parser.add_argument("adapter", type=to_path)
    parser.add_argument("--init", type=to_path, required=True, help="the base model that the adapter was trained on")
    parser.add_argument("--out", type=to_path, required=True, help="directory of the merged model")
    args = parser.parse_args(argv)
    try:
        if args.out.exists():
            raise ValueError(f"--out {args.out} is there already")
        model, tokenizer = load_model(args.init, args.adapter)
        with new_directory(args.out) as work:
            save_model(work, merged(model), tokenizer)
    except (ValueError, OSError) as e:
        fail(e)
    print(f"{args.adapter} merged into {args.init}: {args.out}")


if __name__ == "__main__":
    from lora import main
    main()
