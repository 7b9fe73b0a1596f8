"""Model directories, in Hugging Face's layout and parameter names, and the state of a run for --resume.

    out/sft/        config.json, model.safetensors, tokenizer.*    the weights of the best validation loss
    out/sft/last/   the same, the newest weights, and train_state.pt

Any Llama-shaped Hugging Face directory loads (grouped-query, untied head, several shards). No file is ever half
written: each is made beside its place and then renamed.
"""
import contextlib
import json
import os
import pickle
import re
from dataclasses import fields
from pathlib import Path

from common import is_number, new_directory, write_atomic, write_json

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import lora
import tokenizer as tokenizers
from model import GPT, GPTConfig

WEIGHTS = "model.safetensors"
STATE = "train_state.pt"
GENERATION = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "top_k": 30, "max_new_tokens": 400}  # as sample.py


# ---- config.json ----

# GPTConfig's fields by Hugging Face's names, for writing and reading. A field that is not here (a new one, of a fork)
# is stored under its own name, so that a model is always read back as the one that was trained.
HF_NAMES = {
    "block_size": "max_position_embeddings", "vocab_size": "vocab_size", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "head_size": "head_dim",
    "n_embd": "hidden_size", "intermediate_size": "intermediate_size", "rope_base": "rope_theta",
    "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings", "rope_scaling": "rope_scaling",
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
                 "qwen3": "Qwen3ForCausalLM"}
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # of "llama3"
TOKEN_IDS = "bos_token_id", "eos_token_id", "pad_token_id"  # not read here: the tokenizer knows its own
LARGEST = {"num_hidden_layers": 1000} | dict.fromkeys(  # of sizes; what is beyond is a mistake, and takes forever
    ("max_position_embeddings", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size",
     "intermediate_size"), 2**22)


def hf_config(config, tokenizer, dtype):
    """GPTConfig -> the dict of config.json."""
    # transformers refuses a LlamaConfig whose hidden size is no multiple of its heads; Mistral without a sliding window
    # is the same network under the same parameter names, and allows it.
    llama = config.n_embd % config.n_head == 0
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama" if llama else "mistral"
    return {
        "architectures": [ARCHITECTURES[kind]], "model_type": kind,
        **({"sliding_window": None} if kind == "mistral" else {"attention_bias": False, "mlp_bias": False}),
        **{HF_NAMES.get(field.name, field.name): getattr(config, field.name) for field in fields(config)},
        "hidden_act": "silu", "bos_token_id": None, "eos_token_id": tokenizer.eos_id, "pad_token_id": None,
        "torch_dtype": str(dtype).removeprefix("torch."), "use_cache": True,
    }


def check_value(path, key, value):
    """Raise ValueError if this value of config.json is not of its kind."""
    number = is_number(value)
    if key in LARGEST and not (number and isinstance(value, int) and 1 <= value <= LARGEST[key]):
        raise ValueError(f"{path}: {key} {value!r} is not a size (1 to {LARGEST[key]})")
    if key in ("rms_norm_eps", "rope_theta") and not (number and value > 0):
        raise ValueError(f"{path}: {key} {value!r} is not a positive number")
    if key == "sliding_window" and not (number and value >= 1):
        raise ValueError(f"{path}: {key} {value!r} is not a number of tokens")
    if key in ("rope_scaling", "rope_parameters") and not isinstance(value, dict):
        raise ValueError(f"{path}: {key} {value!r} is not an object")
    if key == "partial_rotary_factor" and not (number and value == 1):
        raise ValueError(f"{path}: {key} {value!r} is not supported: all of a head is rotated")
    ids = value if isinstance(value, list) else [value]
    if key in TOKEN_IDS and not all(type(one) is int and -1 <= one for one in ids):
        raise ValueError(f"{path}: {key} {value!r} is not the number of a token")
    switches = "tie_word_embeddings", "attention_bias", "mlp_bias", "qkv_bias", "qk_norm"
    if key in switches and not isinstance(value, bool):
        raise ValueError(f"{path}: {key} {value!r} is neither true nor false")


def llama3_scaling(path, values):
    """The rope scaling of config.json -> what GPTConfig keeps of it. Raises ValueError."""
    for key in ROPE_SCALING:
        if not (is_number(values.get(key)) and values[key] > 0):
            raise ValueError(f"{path}: {key} {values.get(key)!r} is not a positive number")
    if not values["low_freq_factor"] < values["high_freq_factor"]:
        raise ValueError(f"{path}: low_freq_factor {values['low_freq_factor']} is not below high_freq_factor")
    return {"rope_type": "llama3"} | {key: values[key] for key in ROPE_SCALING}


def gpt_config(path):
    """config.json -> GPTConfig. Raises ValueError for what this model cannot do."""
    try:
        c = dict(json.loads(Path(path).read_text(encoding="utf-8")))
        own = {field.name for field in fields(GPTConfig)} - set(HF_NAMES)  # of a fork: None may mean something there
        c = {key: value for key, value in c.items() if value is not None or key in own}
        given = dict(c)
        for key, value in c.items():
            check_value(path, key, value)
        rope = c.get("rope_parameters", {})
        scalings = {key: c.get(key, {}) for key in ("rope_parameters", "rope_scaling")}  # of transformers 5, older ones
        kinds = {key: value.get("rope_type", value.get("type", "default")) for key, value in scalings.items()}
        scaling = next((scalings[key] for key, kind in kinds.items() if kind == "llama3"), None)
        c["rope_scaling"] = scaling and llama3_scaling(path, scaling)
        c |= {"qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}.get(c.get("model_type"), {})
        if str(c.get("model_type")).startswith("qwen") and not c.get("use_sliding_window"):
            c.pop("sliding_window", None)
        refused = {
            "model_type": c.get("model_type") not in ARCHITECTURES,
            "attention_bias": c.get("attention_bias", False), "mlp_bias": c.get("mlp_bias", False),
            "hidden_act": c.get("hidden_act", "silu") != "silu",
            **{key: kind not in ("default", "llama3") for key, kind in kinds.items()},
            "sliding_window": c.get("sliding_window", c["max_position_embeddings"]) < c["max_position_embeddings"],
        }
        for key, bad in refused.items():
            if bad:
                raise ValueError(f"{path}: {key} {given.get(key)!r} is not supported (the shapes of Llama, Qwen2 and "
                                 "Qwen3 are)")
        # what Hugging Face takes for a key that is not there
        c.setdefault("num_key_value_heads", c["num_attention_heads"])
        c.setdefault("head_dim", c["hidden_size"] // c["num_attention_heads"])
        c = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False} | c
        if "rope_theta" in rope:  # it counts, also where another one stands beside it
            check_value(path, "rope_theta", rope["rope_theta"])
            c["rope_theta"] = rope["rope_theta"]
        c["rope_theta"] = float(c["rope_theta"])
        check_value(path, "head_dim", c["head_dim"])  # it may have been computed
        if c["num_attention_heads"] % c["num_key_value_heads"]:
            raise ValueError(f"{path}: num_attention_heads {c['num_attention_heads']} is no multiple of "
                             f"num_key_value_heads {c['num_key_value_heads']}")
        if c["head_dim"] % 2:
            raise ValueError(f"{path}: head_dim {c['head_dim']} is odd; RoPE turns pairs")
        stored = {field.name: HF_NAMES.get(field.name, field.name) for field in fields(GPTConfig)}
        return GPTConfig(**{name: c[key] for name, key in stored.items() if key in c})
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: line {e.lineno} is not JSON ({e.msg})") from None
    except KeyError as e:
        raise ValueError(f"{path}: {e.args[0]!r} is missing") from None
    except (TypeError, AttributeError) as e:
        raise ValueError(f"{path}: not the config.json of a model ({e})") from None


# ---- models ----

def save_tokenizer(directory, tokenizer):
    for name, content in tokenizer.files.items():
        write_atomic(Path(directory, name), lambda p, content=content: p.write_bytes(content))


def save_model(directory, model, tokenizer):
    """Write a model directory, the weights in the precision they have. A tied head is stored once."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if model.config.tie_embeddings:
        del tensors["lm_head.weight"]
    save_tokenizer(directory, tokenizer)
    write_json(directory / "config.json", hf_config(model.config, tokenizer, model.lm_head.weight.dtype))
    write_json(directory / "generation_config.json", GENERATION | {"eos_token_id": tokenizer.eos_id})
    write_atomic(directory / WEIGHTS, lambda p: save_file(tensors, p, metadata={"format": "pt"}))


def load_model(directory, adapter=None, adapter_scale=1.0):
    """A model directory, or the name of one on the Hugging Face hub -> (GPT, Tokenizer); the weights keep the precision
    of the file. adapter: the directory of a LoRA adapter to put on the model; adapter_scale: how much of it, 0 is the
    model alone.

    Raises ValueError naming the file or the tensor that is missing or does not fit.
    """
    directory = from_hub(directory)
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory}: no model directory " + (
            "but a LoRA adapter: name it with --adapter" if (directory / lora.CONFIG).is_file()
            else "(config.json is missing)"))
    config = gpt_config(directory / "config.json")
    tokenizer = tokenizers.load(directory)
    if tokenizer.vocab_size > config.vocab_size:  # fewer pieces than rows: the vocabulary is padded
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
        if problem := lora.not_weights(tensors[name]):
            raise ValueError(f"{directory}: tensor {name} {problem}")
    model.load_state_dict(tensors, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    if adapter is not None:
        lora.load(adapter, model, adapter_scale)
    return model, tokenizer


def from_hub(name):
    """owner/model, where there is no folder of that name -> the folder to which the hub's files were downloaded; any
    other path as it is. HF_ENDPOINT names a mirror. Raises ValueError."""
    path = Path(name)
    name = path.as_posix()
    if path.parent.exists() and str(path.parent) != "." or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{name}: no such folder; a model on the hub needs pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "tokenizer.model"],
                                      endpoint=os.environ.get("HF_ENDPOINT")))
    except Exception as e:  # of its own, of the HTTP library beneath, or of the file system
        problem = str(e.__cause__ or e).strip().split("\n")[0]
        raise ValueError(f"{name}: no such folder, and not to be had from the hub ({problem}; HF_ENDPOINT names a "
                         "mirror)") from None


def read_tensors(directory):
    """All tensors of a model directory, from one safetensors file or from the shards of an index."""
    index = directory / (WEIGHTS + ".index.json")
    names = [WEIGHTS]
    if not (directory / WEIGHTS).is_file() and index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index}: not an index of shards") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or "\\" in name:
                raise ValueError(f"{index}: {name!r} is not the name of a file in this folder")
    tensors = {}
    for name in names:
        if not (directory / name).is_file():
            raise ValueError(f"{directory / name}: no such file")
        try:
            tensors.update(load_file(directory / name))
        except SafetensorError as e:
            raise ValueError(f"{directory / name}: not a safetensors file ({e})") from None
    return tensors


def find_base():
    """The directory of the base model that ships. Raises ValueError if it is not there."""
    base = Path(__file__).parent / "base"
    if not (base / WEIGHTS).is_file():
        raise ValueError("there is no base model in base/: name one with --init or --ckpt, or make one with "
                         "pretrain.py")
    return base


def find_model(ckpt=None, adapter=None):
    """--ckpt, or out/sft (not under an adapter), or the base model. Raises ValueError if there is none."""
    tuned = Path("out/sft")
    return ckpt or (tuned if not adapter and (tuned / "config.json").is_file() else find_base())


# ---- runs ----

def save_last(out, save, state):
    """Make out/last/ of weights, which save(directory) puts there, and resume state: together, or neither.
    state: plain dicts, tensors and numbers."""
    with new_directory(Path(out, "last")) as new:  # killed between its two renames, a run finds last.old
        save(new)
        write_atomic(new / STATE, lambda p: torch.save(state, p))


def find_last(out):
    """-> (directory of the newest weights, state). Raises ValueError if there is none."""
    for last in (Path(out, "last"), Path(out, "last.old")):
        if (last / STATE).is_file():
            try:
                state = torch.load(last / STATE, map_location="cpu", weights_only=True)
                step, best = state["step"], state["best"]
                if "optimizer" not in state or type(step) is not int or step < 0 or best is not None and not (
                        len(best) == 2 and is_number(best[0]) and type(best[1]) is int):
                    raise ValueError("not the state of a run")
                return last, state
            except (RuntimeError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError) as e:
                raise ValueError(f"--resume: {last / STATE} is damaged ({type(e).__name__}){what_is_left(out)}"
                                 ) from None
    raise ValueError(f"--resume: {Path(out, 'last', STATE)} does not exist: the run stopped before its first save, or "
                     f"there was none. Start it without --resume, or with --overwrite{what_is_left(out)}")


def what_is_left(out):
    """For a line that says what is damaged."""
    there = any(Path(out, name).is_file() for name in (WEIGHTS, lora.TENSORS))
    return f"; the best model, in {out}, is what is left" if there else ""


@contextlib.contextmanager
def resuming(out):
    """Around the loading of a run's newest weights: a line about what is wrong also says what is left."""
    try:
        yield
    except (ValueError, OSError) as e:
        raise ValueError(f"--resume: {e}{what_is_left(out)}") from None


def load_last(out):
    """-> (GPT, Tokenizer, state) of the newest save. Raises ValueError if there is none, or it is damaged."""
    last, state = find_last(out)
    with resuming(out):
        return *load_model(last), state
