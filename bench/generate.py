"""How fast are stories written, beside other tools and this project's past? python bench/generate.py [--work many …]

many: 64 stories at once, as `sample.py --file` writes them. one-small, one-44M: a single story, greedy, float32, 256
tokens after 32, without an end. All sides have the same weights, must compute the same logits, and write in turn.
"""
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.turns import (  # noqa: E402
    BEFORE,
    ROOT,
    Side,
    bench_parser,
    compare_logits,
    print_header,
    print_rows,
    roots,
    serve,
    take_turns,
    tell,
)

NEW = 256
SAMPLING = {"temperature": 0.2, "top_k": 30, "top_p": 0.9, "max_new_tokens": 400}  # sample.py's defaults
ONE = ("ours", BEFORE, "transformers", "llama.cpp", "llama.cpp, 1 thread")
WORKS = {  # work: (title, sides, stories a round)
    "many": ("small, 64 stories at once, temperature 0.2", ("ours", BEFORE), 1),
    "one-small": ("small, one story, fp32", ONE, 4),
    "one-44M": ("44M, one story, fp32", ONE, 2),
}


def make_model(work):
    """-> (GPT in float32, id of EOS): the base that ships, or the 44M geometry with random weights."""
    import torch

    from checkpoint import load_model
    from model import GPT, PRESETS
    if work != "one-44M":
        model, tokenizer = load_model(ROOT / "base")
        return model.float().eval(), tokenizer.eos_id
    torch.manual_seed(0)
    model = GPT(PRESETS["microstories"])
    with torch.no_grad():  # k starts as q: equal logits would not show that they are in their places
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.02))
    return model.eval(), None


def make_item(work):
    """-> what all sides write stories after, a list of prompts, lists of ids."""
    if work == "one-44M":
        return [[(31 * i) % 65024 for i in range(32)]]
    import tokenizer
    from constraints import render
    from data.generate import stories
    from data.judged import builtin_rows
    from dataset import encode_prompt
    base = tokenizer.load(ROOT / "base")
    if work == "one-small":
        return [base.encode(next(iter(stories(1, 5)))["text"])[:32]]
    return [encode_prompt(base, render(row["constraints"])) for row in builtin_rows()[:64]]


# ---- the sides: setup(work, folder) -> (logits(ids (B, T)) -> (B, T, V), write(prompts) -> new ids of each) ----

def ours(work, folder):
    """sample.py's way to many stories (continue_all at BEFORE) and GPT.generate for one; on the files of a commit."""
    import torch

    import sample
    model, eos_id = make_model(work)
    generate_all = getattr(sample, "generate_all", None) or sample.continue_all
    generate = getattr(sample, "generate", None) or type(model).generate

    def write(prompts):
        if work == "many":
            return generate_all(model, prompts, eos_id, 1337, SAMPLING, quiet=True)
        return generate(model, prompts, NEW, temperature=0)
    return torch.no_grad()(lambda ids: model(torch.tensor(ids))), write


def transformers(work, folder):
    """`generate` as it comes: greedy, KV cache, SDPA."""
    import torch

    from bench.train import transformers_model
    own, _ = make_model(work)
    model = transformers_model(own.config, own.state_dict()).eval()

    def write(prompts):
        ids = torch.tensor(prompts)
        new = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
                             pad_token_id=0)
        return new[:, ids.size(1):].tolist()
    return torch.no_grad()(lambda ids: model(torch.tensor(ids)).logits), write


def llama_cpp(work, folder, threads=None):
    """llama.cpp's C functions through llama-cpp-python, on a float32 GGUF, with its cache in float32 and without its
    flash attention, which rounds to float16: so it computes what the others compute, and is no slower than by default.

    In its favour: no tokens to text, no Python wrapper around decoding, the argmax by numpy in place of its sampler;
    all cores, as its command has it (llama-cpp-python takes half of them), and a side with one thread.
    """
    import llama_cpp as lib
    import numpy as np
    own, _ = make_model(work)
    path, V = Path(folder, "model.gguf"), own.config.vocab_size
    write_gguf(path, own.config, own.state_dict())
    quiet = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(quiet, lib.ctypes.c_void_p(0))
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx = own.config.block_size
    params.n_threads = params.n_threads_batch = threads or usable_cores()
    params.type_k = params.type_v = lib.GGML_TYPE_F32
    params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = lib.llama_init_from_model(model, params)
    cache = lib.llama_get_memory(context)

    def decode(ids, all_logits=False):
        """ids (T,) behind what the cache holds -> logits of the last (V,), or of all (T, V)."""
        array = (lib.llama_token * len(ids))(*ids)
        batch = lib.llama_batch_get_one(array, len(ids))
        if all_logits:
            flags = (lib.ctypes.c_int8 * len(ids))(*[1] * len(ids))
            batch.logits = flags
        if lib.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        rows = len(ids) if all_logits else 1
        return np.ctypeslib.as_array(lib.llama_get_logits(context), (rows, V))

    def logits(rows):
        out = []
        for ids in rows:
            lib.llama_memory_clear(cache, True)
            out.append(decode(ids, all_logits=True).copy())
        return np.stack(out)

    def write(prompts):
        lib.llama_memory_clear(cache, True)
        last, new = decode(prompts[0]), []
        for _ in range(NEW - 1):
            new.append(int(last[0].argmax()))
            last = decode(new[-1:])
        return [[*new, int(last[0].argmax())]]
    write.keep = quiet  # C holds on to it
    return logits, write


def usable_cores():
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def write_gguf(path, config, tensors):
    """Our weights -> a GGUF file that llama.cpp reads as a Llama without a tokenizer."""
    import gguf
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}

    def add(name, tensor, heads=None):
        if heads:  # llama.cpp rotates the pairs (2i, 2i + 1) of a head, not (i, i + D/2)
            tensor = tensor.view(heads, 2, config.head_size // 2, -1).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(name, tensor.detach().float().contiguous().numpy())
    add("token_embd.weight", tensors["model.embed_tokens.weight"])  # no output.weight: the head is tied
    add("output_norm.weight", tensors["model.norm.weight"])
    for i in range(config.n_layer):
        for one, other in names.items():
            heads = {"attn_q": config.n_head, "attn_k": config.n_kv_head}.get(other)
            add(f"blk.{i}.{other}.weight", tensors[f"model.layers.{i}.{one}.weight"], heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SIDES = {"ours": ours, BEFORE: ours, "transformers": transformers, "llama.cpp": llama_cpp,
         "llama.cpp, 1 thread": lambda *args: llama_cpp(*args, threads=1)}


def be_side(name, work, folder, root):
    """The process of a side: on the files of the project in `root`."""
    sys.path.insert(0, str(root))
    logits, write = SIDES[name](work, folder)

    def step(prompts):
        new = write(prompts)
        return sum(map(len, new)), new
    serve(logits, step, [json.loads(Path(folder, "item.json").read_text())])


def compare(work, args, root_of):
    """The sides of one work in turn, and their rows of the table."""
    title, names, steps = WORKS[work]
    item = make_item(work)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "item.json").write_text(json.dumps(item))
        sides = []
        try:
            for name in names:
                if name != "llama.cpp, 1 thread" or usable_cores() > 1:
                    sides.append(Side(name, __file__, "--be", json.dumps([name, work, folder,
                                                                          str(root_of.get(name, ROOT))])))
            shortest = min(map(len, item))
            compare_logits(sides, [ids[:shortest] for ids in item[:4]],
                           {"llama.cpp": 1e-3, "llama.cpp, 1 thread": 1e-3}, folder)
            texts = {side.name: side.ask(steps=1)["result"] for side in sides}
            for name, text in texts.items():
                same = sum(a == b for a, b in zip(sum(text, []), sum(texts["ours"], [])))
                tell(f"  {name}: {len(text)} stories, {sum(map(len, text)):,} tokens, {same:,} of them as ours")
                if work != "many" and name == "transformers" and text != texts["ours"]:
                    raise SystemExit("transformers writes another greedy text")
            rates, peaks = take_turns(sides, args.rounds, args.steps or steps)
        finally:
            for side in sides:
                side.close()
    print_rows(title, rates, peaks)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--be"]:
        return be_side(*json.loads(argv[1]))
    args = bench_parser("Speed of writing stories beside other tools", WORKS,
                        "times that a side writes its stories in a round (default: 1, of single ones 4 and 2)"
                        ).parse_args(argv)
    with roots() as root_of:
        print_header()
        for work in args.work:
            tell(work)
            compare(work, args, root_of)


if __name__ == "__main__":
    from bench.generate import main
    main()
