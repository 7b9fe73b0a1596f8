"""Model directories, in Hugging Face's layout and parameter names, and the state of a run for --resume.

    out/sft/        config.json, model.safetensors, tokenizer.*    the weights of the best validation loss
    out/sft/last/   the same, the newest weights, and train_state.pt

Any Llama-shaped Hugging Face directory loads (grouped-query, untied head, several shards). No file is ever half
written: each is made beside its place and then renamed.
"""
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import tokenizer as tokenizers
from common import write_atomic
from model import GPT, GPTConfig

WEIGHTS = "model.safetensors"
STATE = "train_state.pt"
MAX_PADDING = 512  # a model's vocabulary may be padded beyond the tokenizer's to a round number, not more


# ---- config.json ----

def hf_config(config, tokenizer, dtype):
    """GPTConfig -> the dict of config.json."""
    # transformers refuses a LlamaConfig whose hidden size is no multiple of its heads; Mistral without a sliding window
    # is the same network under the same parameter names, and allows it.
    llama = config.n_embd % config.n_head == 0
    return {
        "architectures": ["LlamaForCausalLM" if llama else "MistralForCausalLM"],
        "model_type": "llama" if llama else "mistral",
        **({"attention_bias": False, "mlp_bias": False} if llama else {"sliding_window": None}),
        "hidden_size": config.n_embd, "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head, "num_key_value_heads": config.n_kv_head, "head_dim": config.head_size,
        "intermediate_size": config.intermediate_size, "hidden_act": "silu",
        "max_position_embeddings": config.block_size, "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_base, "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_id, "pad_token_id": None,
        "torch_dtype": str(dtype).removeprefix("torch."), "use_cache": True,
    }


def gpt_config(path):
    """config.json -> GPTConfig. Raises ValueError for what this model cannot do."""
    try:
        c = dict(json.loads(Path(path).read_text(encoding="utf-8")))
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}  # transformers 5, 4
        window = c.get("sliding_window")
        refused = {
            "model_type": c.get("model_type") not in ("llama", "mistral"),
            "attention_bias": c.get("attention_bias", False), "mlp_bias": c.get("mlp_bias", False),
            "hidden_act": c.get("hidden_act", "silu") != "silu",
            "rope_parameters": rope.get("rope_type", rope.get("type", "default")) != "default",
            "sliding_window": window is not None and window < c["max_position_embeddings"],
        }
        for key, bad in refused.items():
            if bad:
                raise ValueError(f"{path}: {key} {c.get(key)!r} is not supported (a plain Llama shape is)")
        for key in ("max_position_embeddings", "vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size",
                    "intermediate_size"):
            if not isinstance(c[key], int) or c[key] < 1:
                raise ValueError(f"{path}: {key} {c[key]!r} is not a size")
        return GPTConfig(
            block_size=c["max_position_embeddings"], vocab_size=c["vocab_size"], n_layer=c["num_hidden_layers"],
            n_head=c["num_attention_heads"], n_kv_head=c.get("num_key_value_heads") or c["num_attention_heads"],
            head_size=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"], n_embd=c["hidden_size"],
            intermediate_size=c["intermediate_size"],
            rope_base=float(c.get("rope_theta") or rope.get("rope_theta", 10000.0)),
            norm_eps=c.get("rms_norm_eps", 1e-6), tie_embeddings=c.get("tie_word_embeddings", False))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: line {e.lineno} is not JSON ({e.msg})") from None
    except KeyError as e:
        raise ValueError(f"{path}: {e.args[0]!r} is missing") from None
    except (TypeError, AttributeError) as e:
        raise ValueError(f"{path}: not the config.json of a model ({e})") from None


# ---- models ----

def save_model(directory, model, tokenizer):
    """Write a model directory, the weights in the precision they have. A tied head is stored once."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if model.config.tie_embeddings:
        del tensors["lm_head.weight"]
    config = hf_config(model.config, tokenizer, model.lm_head.weight.dtype)
    tokenizer.save(directory)
    write_atomic(directory / "config.json", lambda p: p.write_text(json.dumps(config, indent=2), encoding="utf-8"))
    write_atomic(directory / WEIGHTS, lambda p: save_file(tensors, p, metadata={"format": "pt"}))


def load_model(directory):
    """A model directory -> (GPT, Tokenizer); the weights keep the precision of the file.

    Raises ValueError naming the file or the tensor that is missing or does not fit.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory}: no model directory (config.json is missing)")
    config = gpt_config(directory / "config.json")
    tokenizer = tokenizers.load(directory)
    if not fits(tokenizer, config):
        raise ValueError(f"{directory}: the tokenizer has {tokenizer.vocab_size} pieces, "
                         f"but the model has a vocabulary of {config.vocab_size}")
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        model = GPT(config)
    expected = model.state_dict()
    tensors = {k: v for k, v in read_tensors(directory).items() if not k.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    for name in (*expected, *tensors):
        if name not in tensors:
            raise ValueError(f"{directory}: tensor {name} is missing")
        if name not in expected:
            raise ValueError(f"{directory}: tensor {name} has no place in the model that config.json describes")
        if tensors[name].shape != expected[name].shape:
            raise ValueError(f"{directory}: tensor {name} is {tuple(tensors[name].shape)}, but config.json asks for "
                             f"{tuple(expected[name].shape)}")
    model.load_state_dict(tensors, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model, tokenizer


def read_tensors(directory):
    """All tensors of a model directory, from one safetensors file or from the shards of an index."""
    index = directory / (WEIGHTS + ".index.json")
    names = [WEIGHTS]
    if not (directory / WEIGHTS).is_file() and index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index}: not an index of shards") from None
    tensors = {}
    for name in names:
        if not (directory / name).is_file():
            raise ValueError(f"{directory / name}: no such file")
        try:
            tensors.update(load_file(directory / name))
        except SafetensorError as e:
            raise ValueError(f"{directory / name}: not a safetensors file ({e})") from None
    return tensors


def fits(tokenizer, config):
    return tokenizer.vocab_size <= config.vocab_size < tokenizer.vocab_size + MAX_PADDING


def find_base():
    """The directory of the base model that ships, or None."""
    base = Path(__file__).parent / "base"
    return base if (base / WEIGHTS).is_file() else None


# ---- runs ----

def save_last(out, write, state):
    """Make out/last/ of weights, which write(directory) puts there, and resume state: together, or neither.
    state: plain dicts, tensors and numbers."""
    last, new, old = Path(out, "last"), Path(out, "last.new"), Path(out, "last.old")
    shutil.rmtree(new, ignore_errors=True)
    write(new)
    torch.save(state, new / STATE)
    if last.exists():
        shutil.rmtree(old, ignore_errors=True)
        last.rename(old)
    new.rename(last)  # killed between the two renames, a run finds last.old
    shutil.rmtree(old, ignore_errors=True)


def find_last(out):
    """-> (directory of the newest weights, state). Raises ValueError if there is none."""
    for last in (Path(out, "last"), Path(out, "last.old")):
        if (last / STATE).is_file():
            return last, torch.load(last / STATE, weights_only=True)
    raise ValueError(f"--resume: {Path(out, 'last', STATE)} does not exist, there is no run to go on with")


def load_last(out):
    """-> (GPT, Tokenizer, state) of the newest save. Raises ValueError if there is none."""
    last, state = find_last(out)
    return *load_model(last), state

