"""Pretrain a base model on plain stories: python pretrain.py --data stories.jsonl --out out/my_base

The loop is train_sft.py's. Here are the plain-text batches (stories packed one behind the other, EOS between them), the
optimizer and the settings of a base model. `--preset microstories` has the study's: 44M parameters, 512 x 512 tokens a
step. --data may also be what data/prepare.py wrote: token files, and the tokenizer they were made with.
"""
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

from common import fail, has_bf16, lock, number, rank, to_path, wait_for_all, world

import numpy as np
import torch
from tqdm import tqdm

import tokenizer as tokenizers
from checkpoint import HF_NAMES, LARGEST, load_last, load_model, save_model
from constraints import KEYS
from data import builtin, generate
from dataset import PROMPT, TokenBatches
from model import GPT, PRESETS
from records import read_stories, split_by_story
from train_sft import adamw, check_out, data_files, parse, run, set_block_size, start, training_parser

# What differs from fine-tuning's defaults. small: those of the base that ships.
SETTINGS = {
    "small": {"lr": 2e-3, "batch_size": 16, "weight_decay": 0.1, "warmup": 200, "epochs": 1.0},
    "microstories": {"lr": 5e-4, "batch_size": 32, "grad_accum": 16, "weight_decay": 0.1, "warmup": 1000,
                     "epochs": 1.0, "vocab_size": 65024},
}
GEOMETRY = ("n_layer", "n_head", "n_kv_head", "head_size", "n_embd", "intermediate_size")
MOST_PARAMETERS = 10**10  # more is a mistake, and takes all memory
BUILTIN_TOKENIZER = 12_000  # texts that the built-in corpus's tokenizer is trained on
MUON_LR = 6  # Muon's learning rate, as a multiple of AdamW's
VAL_WINDOWS = 48  # of block_size tokens: enough to see the loss fall, and no time lost


def parse_args(argv=None):
    parser = training_parser("Pretrain a base model on plain stories, or on what data/prepare.py made of them.")
    parser.add_argument("--preset", choices=PRESETS, default="small",
                        help="geometry and settings of a new model (default: %(default)s)")
    parser.add_argument("--tokenizer", type=to_path, help="tokenizer.model to use (default: train one on --data)")
    parser.add_argument("--vocab-size", type=size("vocab_size"), default=4096,
                        help="pieces of a newly trained tokenizer (default: %(default)s)")
    for name in GEOMETRY:
        parser.add_argument(f"--{name.replace('_', '-')}", type=size(name),
                            help="of a new model (default: the preset's)")
    parser.set_defaults(out=Path("out/base"), val_fraction=0.01, **SETTINGS["small"])
    parser.set_defaults(**SETTINGS[parser.parse_known_args(argv)[0].preset])
    args = parse(parser, argv, fixed=("init", "preset", "tokenizer", "vocab_size", *GEOMETRY))
    if args.init and (given := [name for name in GEOMETRY if getattr(args, name)]):
        fail(f"--{given[0].replace('_', '-')} is for a new model; that of --init has a shape already")
    return args


def size(name):
    """-> a type for argparse: what a field of GPTConfig may be."""
    most = LARGEST[HF_NAMES[name]]
    return number(int, lambda value: 0 < value <= most, f"is not from 1 to {most}")


def new_config(args):
    """The shape of a new model: the preset's but for the flags. Raises ValueError for heads that cannot be shared."""
    given = {name: getattr(args, name) for name in GEOMETRY if getattr(args, name)}
    if "n_head" in given:
        given = {"n_kv_head": given["n_head"]} | given
    config = replace(PRESETS[args.preset], **given)
    if config.n_head % config.n_kv_head:
        raise ValueError(f"--n-head {config.n_head} is no multiple of --n-kv-head {config.n_kv_head}")
    if config.head_size % 2:
        raise ValueError(f"--head-size {config.head_size} is odd; RoPE turns pairs")
    with torch.device("meta"):
        parameters = GPT(config).num_params()
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"a model of this shape has {parameters:,} parameters: more than {MOST_PARAMETERS:,}")
    return config


class MuonAdamW:
    """Muon (Jordan et al. 2024) for the matrices of the layers and AdamW for the rest, as one optimizer.

    Muon's update is nearly orthogonal whatever the gradient's size; match_rms_adamw gives its entries a root mean
    square of 0.2 learning rates in a matrix of any shape. That learning rate is MUON_LR times AdamW's. --beta1 and
    --beta2 are AdamW's.
    """

    def __init__(self, model, lr, weight_decay, betas):
        matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
        chosen = set(map(id, matrices))
        others = [p for p in model.parameters() if id(p) not in chosen]
        muon = torch.optim.Muon([{"params": matrices, "lr_scale": MUON_LR}], lr=lr * MUON_LR,
                                weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.parts = [adamw(model, lr, weight_decay, betas, params=others), muon]

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        if not isinstance(states, list) or len(states) != len(self.parts):
            raise ValueError("the run was begun with another optimizer")
        for part, state in zip(self.parts, states):
            part.load_state_dict(state)


def optimizer_for(model, lr, weight_decay, betas):
    """MuonAdamW; AdamW where bfloat16 is emulated, in which torch's Muon always works: it would take seconds a step."""
    if has_bf16(model.lm_head.weight.device):
        return MuonAdamW(model, lr, weight_decay, betas)
    print("notice: this device has no bfloat16: AdamW instead of Muon", file=sys.stderr)
    return adamw(model, lr, weight_decay, betas)


def load_stories(args):
    """-> (train, val), lists of texts."""
    if args.data is None:
        texts = tqdm(builtin.pretraining(), total=builtin.BOOKS + builtin.EXERCISES, unit="text", disable=rank() > 0)
        return list(texts), builtin.pretraining_validation()
    train_file, val_file = data_files(args)
    if val_file:
        return read_stories(train_file, args.encoding), read_stories(val_file, args.encoding)
    return split_by_story(read_stories(train_file, args.encoding), args.val_fraction)


def train_tokenizer(texts, vocab_size, of_grammar=False):
    """A tokenizer of these stories that also has pieces for the words of the prompt template and its keys, which
    fine-tuning repeats in every row: without them half of a short prompt is spelled out in letters and bytes.
    of_grammar: the stories are the built-in ones, whose words are known."""
    fixed = [*PROMPT.format("").split(), *KEYS] * (1 + len(texts) // 10)
    if of_grammar:
        texts = generate.segments(texts[-BUILTIN_TOKENIZER:])
    return tokenizers.train(fixed + texts, vocab_size)


def write_tokens(path, texts, tokenizer):
    """Stories -> a file of their ids, an EOS behind each; returned as a memory-mapped array (N,)."""
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock(path.parent.parent)  # the run directory: another run may be reading these files
        try:
            with open(path, "wb") as f:
                for text in texts:
                    f.write(tokenizer.story(text).tobytes())
        except OSError as e:
            raise OSError(f"cannot write to {path}: {e.strerror}") from None
    wait_for_all()
    return np.memmap(path, tokenizer.dtype, mode="r")


def read_manifest(args):
    """What data/prepare.py says of its files in --data; None if --data is stories. Raises ValueError."""
    path = args.data and args.data / "manifest.json"
    if not (path and path.is_file()):
        return None
    if args.val_data:
        raise ValueError(f"--val-data: {args.data} has a validation part of its own")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        manifest = None
    if not (isinstance(manifest, dict) and {"stories", "tokens", "characters", "dtype", "sha256"} <= set(manifest)):
        raise ValueError(f"{path} is not of data/prepare.py")
    return manifest


def open_tokens(directory, manifest, tokenizer):
    """The token files of data/prepare.py -> two memory-mapped arrays (N,). Raises ValueError if they do not fit."""
    if hashlib.sha256(tokenizer.identity).hexdigest() != manifest["sha256"].get("tokenizer.model"):
        raise ValueError(f"{directory} was tokenized with another tokenizer than the model's "
                         f"(--tokenizer, --init or --resume): prepare it anew with that one")
    files = [np.memmap(directory / f"{side}.bin", manifest["dtype"], mode="r") for side in ("train", "val")]
    if [len(tokens) for tokens in files] != [manifest["tokens"][side] for side in ("train", "val")]:
        raise ValueError(f"{directory}: train.bin or val.bin is not the one of manifest.json")
    return files


def main(argv=None):
    args = parse_args(argv)
    state = None
    try:
        check_out(args)
        start(args)
        manifest = read_manifest(args)
        texts, val_texts = ([], []) if manifest else load_stories(args)
        if args.resume:
            model, tokenizer, state = load_last(args.out)
        elif args.init:
            if args.tokenizer:
                raise ValueError("--tokenizer: the model of --init has its own")
            model, tokenizer = load_model(args.init)
        else:
            ready = args.tokenizer or (args.data if manifest else None)
            tokenizer = (tokenizers.load(ready) if ready
                         else train_tokenizer(texts, args.vocab_size, of_grammar=args.data is None))
            config = new_config(args)
            # where as many pieces are asked for as the preset has (microstories: the study's 65,024), rows without a
            # piece are padding; else the tokenizer decides
            if args.vocab_size != config.vocab_size or tokenizer.vocab_size > config.vocab_size:
                config = replace(config, vocab_size=tokenizer.vocab_size)
            model = GPT(replace(config, block_size=args.block_size or config.block_size))
        set_block_size(args, model)
        counts = manifest or {"stories": {"train": len(texts), "val": len(val_texts)},
                              "characters": sum(map(len, texts + val_texts))}
        print(f"{counts['stories']['train']} stories to train on, {counts['stories']['val']} for validation; "
              f"a vocabulary of {tokenizer.vocab_size} pieces, {model.num_params():,} parameters")
        if manifest:
            tokens, val_tokens = open_tokens(args.data, manifest, tokenizer)
        else:
            tokens = write_tokens(args.out / "tokens" / "train.bin", texts, tokenizer)
            val_tokens = write_tokens(args.out / "tokens" / "val.bin", val_texts, tokenizer) if val_texts else []
        print(f"{len(tokens):,} tokens, {counts['characters'] / (len(tokens) + len(val_tokens)):.2f} characters each")
        batches = TokenBatches(tokens, args.block_size, args.batch_size, args.grad_accum, args.seed, rank(), world())
        val_batches = []
        if len(val_tokens):
            val_batches = TokenBatches(val_tokens, min(args.block_size, len(val_tokens) - 1), args.batch_size, 1,
                                       args.seed).validation(VAL_WINDOWS)
    except (ValueError, OSError) as e:
        fail(e)
    run(args, model, batches, val_batches, lambda directory: save_model(directory, model, tokenizer), state,
        optimizer_for)


if __name__ == "__main__":
    from pretrain import main
    main()
