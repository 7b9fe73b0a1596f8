"""How fast does training go, beside other tools and this project's past? python bench/train.py [--work full-bf16 …]

All sides start from the same weights, must compute the same logits and the same first loss, and train on the same rows
in turn. Imports of a side stand in its function: each runs in a process of its own, one on the files of another commit.
"""
import json
import random
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.turns import (  # noqa: E402
    BEFORE,
    ROOT,
    Side,
    bench_parser,
    compare_logits,
    compare_losses,
    print_header,
    print_rows,
    roots,
    run_command,
    serve,
    take_turns,
    tell,
)

LR = 1e-4
R, ALPHA, ALL_LINEAR = 8, 16, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FULL = ("ours", BEFORE, "litgpt", "litgpt-untied", "transformers")
LORA = ("ours", BEFORE, "peft", "litgpt")
IF_NAMED = ("litgpt-1-row",)  # sides that run only if --side names them
STEPS = {  # work: (title, precision, sides); 44M geometry, 8 ragged rows a step
    "full-bf16": ("44M, full SFT, bf16-mixed", "bf16-mixed", FULL),
    "full-fp32": ("44M, full SFT, 32-true", "32-true", FULL),
    "lora-bf16": ("44M, LoRA r=8 on all Linears, bf16-mixed", "bf16-mixed", LORA),
    "lora-fp32": ("44M, LoRA r=8 on all Linears, 32-true", "32-true", LORA),
}
WORKS = (*STEPS, "pretrain", "main-job")


def make_batches(n, vocab_size, seed=0):
    """-> n batches of 8 rows (ids, labels), lists of 120 to 420 random ids each; the first 35% are the prompt."""
    rng = random.Random(seed)
    batches = []
    for _ in range(n):
        rows = []
        for _ in range(8):
            ids = [rng.randrange(vocab_size) for _ in range(rng.randint(120, 420))]
            prompt = int(0.35 * len(ids))
            rows.append((ids, [-100] * prompt + ids[prompt:]))
        batches.append(rows)
    return batches


# ---- the sides: setup(weights, precision, with_lora) -> (model(ids) -> logits, step(rows) -> mean loss) ----

def ours(weights, precision, with_lora):
    """The loop of train_sft.py. Makes the file of weights, which the other sides read."""
    import torch
    from safetensors.torch import save_file

    import lora
    from dataset import collate
    from model import GPT, PRESETS
    torch.manual_seed(0)
    model = GPT(PRESETS["microstories"])
    if with_lora:
        lora.add(model, ALL_LINEAR, R, ALPHA)
    with torch.no_grad():  # k starts as q and B at 0: equal logits would not show that they are in their places
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.02))
    save_file({name: p.detach() for name, p in model.named_parameters()}, weights)
    step = our_step(model, precision)
    return model, lambda rows: step([collate(rows)])


def our_step(model, precision):
    """-> step(micro-batches (x, y)) -> mean loss: an optimizer step as `train_sft.train` makes it."""
    import common

    import torch

    from dataset import next_token_loss
    from train_sft import adamw, backward
    common.keep_freed_memory()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(model, LR)
    autocast = torch.autocast(params[0].device.type, torch.bfloat16, enabled=precision == "bf16-mixed")

    def step(micro_batches):
        loss, _ = backward(model, micro_batches, next_token_loss, params, autocast)
        torch.nn.utils.clip_grad_norm_(params, 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        return loss
    return step


def before(weights, precision, with_lora):
    """The loop of train_sft.py at BEFORE, on the files of that commit."""
    import torch
    from safetensors.torch import load_file

    import lora
    from dataset import collate
    from model import GPT, PRESETS
    from train_sft import backward
    model = GPT(PRESETS["microstories"])
    if with_lora:
        lora.add(model, ALL_LINEAR, R, ALPHA)
    model.load_state_dict(load_file(weights), strict=False)  # without lm_head.weight, which is tied
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": [p for p in params if p.dim() >= 2]},
                                   {"params": [p for p in params if p.dim() < 2]}],
                                  lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")

    def step(rows):
        loss = backward(model, [collate(rows)], autocast, torch.device("cpu"))
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss
    return model, step


def litgpt(weights, precision, with_lora, tied=True, micro_batch=8):
    """An iteration of litgpt's finetune/full.py or finetune/lora.py: its model under its Fabric, its collate function,
    its chunked loss, its optimizer, which is torch's AdamW as it comes (no fused kernel), and no clipping.

    In litgpt's favour: the head is tied by hand (finetune_full makes 33M parameters of its own of it, the side
    "litgpt-untied"); LoRA without its dropout of 0.05; no logging. micro_batch: its default is 1 row, of which 8 are
    accumulated ("litgpt-1-row"), as fast and smaller; the table compares all with 8 rows at once.
    """
    import lightning
    import torch
    from litgpt.data import get_sft_collate_fn
    from litgpt.utils import chunked_cross_entropy, instantiate_torch_optimizer
    from safetensors.torch import load_file

    from model import PRESETS
    if with_lora:
        from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    else:
        from litgpt.model import GPT, Config
    c, tensors = PRESETS["microstories"], load_file(weights)
    places = {"lora_r": R, "lora_alpha": ALPHA, "lora_dropout": 0.0, "lora_query": True, "lora_key": True,
              "lora_value": True, "lora_projection": True, "lora_mlp": True, "lora_head": False} if with_lora else {}
    model = GPT(Config(
        block_size=c.block_size, n_layer=c.n_layer, n_embd=c.n_embd, vocab_size=c.vocab_size,
        padded_vocab_size=c.vocab_size, n_head=c.n_head, n_query_groups=c.n_kv_head, head_size=c.head_size,
        intermediate_size=c.intermediate_size, rope_base=int(c.rope_base), rotary_percentage=1.0, norm_eps=c.norm_eps,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", bias=False, parallel_residual=False, **places))
    if with_lora:
        mark_only_lora_as_trainable(model)
    model.load_state_dict(litgpt_names(tensors, c.n_layer, with_lora))
    if tied:
        head = model.lm_head.linear if with_lora else model.lm_head
        head.weight = model.transformer.wte.weight
    tell(f"  litgpt{'' if tied else '-untied'}: {sum(p.numel() for p in model.parameters()):,} parameters")
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    setup = fabric.setup(model)
    optimizer = instantiate_torch_optimizer("AdamW", model.parameters())
    optimizer.param_groups[0]["lr"] = LR
    optimizer = fabric.setup_optimizers(optimizer)
    collate = get_sft_collate_fn()

    def step(rows):
        total = 0.0
        for i in range(0, len(rows), micro_batch):
            batch = collate([{"input_ids": torch.tensor(ids), "labels": torch.tensor(labels),
                              "token_counts": {"raw": len(ids), "raw_plus_prompt_template": len(ids)}}
                             for ids, labels in rows[i:i + micro_batch]])
            targets = batch["labels"][..., 1:]
            if with_lora:
                logits = setup(batch["input_ids"], lm_head_chunk_size=128)
                logits[-1] = logits[-1][..., :-1, :]
            else:
                logits = setup(batch["input_ids"])[..., :-1, :]
            loss = chunked_cross_entropy(logits, targets) * micro_batch / len(rows)
            fabric.backward(loss)
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total
    return model, step


def litgpt_names(tensors, n_layer, with_lora):
    """Our tensors by name -> litgpt's, which has q, k and v in one Linear."""
    import torch
    base = ".linear.weight" if with_lora else ".weight"
    parts = {".weight": base} | ({".lora_A.weight": ".lora_A", ".lora_B.weight": ".lora_B"} if with_lora else {})
    embedding = tensors["model.embed_tokens.weight"]
    out = {"transformer.wte.weight": embedding, f"lm_head{base}": embedding,
           "transformer.ln_f.weight": tensors["model.norm.weight"]}
    for i in range(n_layer):
        ours, theirs = f"model.layers.{i}", f"transformer.h.{i}"
        out[f"{theirs}.norm_1.weight"] = tensors[f"{ours}.input_layernorm.weight"]
        out[f"{theirs}.norm_2.weight"] = tensors[f"{ours}.post_attention_layernorm.weight"]
        for part, name in parts.items():
            out[f"{theirs}.attn.qkv{name}"] = torch.cat([tensors[f"{ours}.self_attn.{x}_proj{part}"] for x in "qkv"])
            for one, other in (("self_attn.o_proj", "attn.proj"), ("mlp.gate_proj", "mlp.fc_1"),
                               ("mlp.up_proj", "mlp.fc_2"), ("mlp.down_proj", "mlp.proj")):
                out[f"{theirs}.{other}{name}"] = tensors[f"{ours}.{one}{part}"]
    return out


def transformers_model(config, tensors):
    """-> transformers' Llama or Mistral of this GPTConfig with our tensors, in training mode."""
    import transformers

    from checkpoint import hf_config
    tokenizer = type("Tokenizer", (), {"eos_id": None})
    settings = hf_config(config, tokenizer, "float32")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**settings))
    model.load_state_dict({name: x for name, x in tensors.items() if "lora_" not in name}, strict=False)
    model.tie_weights()
    return model.train()


def huggingface(weights, precision, with_lora):
    """A step of transformers' Trainer, for TRL's SFTTrainer and peft alike: forward with labels under autocast, its
    default optimizer adamw_torch_fused, its default clipping at 1.0, attention by SDPA, its default.

    In its favour: no attention mask (padding stands on the right, so causal attention needs none; TRL passes one), no
    copy of the logits in float32 for the caller, no logging or callbacks.
    """
    import torch
    from safetensors.torch import load_file
    from torch.nn.utils.rnn import pad_sequence

    from model import PRESETS
    tensors = load_file(weights)
    model = transformers_model(PRESETS["microstories"], tensors)
    if with_lora:
        import peft
        model = peft.get_peft_model(model, peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear",
                                                           task_type="CAUSAL_LM"))
        adapter = {f"base_model.model.{name}": x for name, x in tensors.items() if "lora_" in name}
        peft.set_peft_model_state_dict(model, adapter)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.0, fused=True)

    def step(rows):
        ids, labels = zip(*rows)
        ids = pad_sequence([torch.tensor(x) for x in ids], batch_first=True)
        labels = pad_sequence([torch.tensor(x) for x in labels], batch_first=True, padding_value=-100)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return (lambda ids: model(input_ids=ids).logits), step


SIDES = {"ours": ours, BEFORE: before, "litgpt": litgpt, "transformers": huggingface, "peft": huggingface,
         "litgpt-untied": lambda *args: litgpt(*args, tied=False),
         "litgpt-1-row": lambda *args: litgpt(*args, micro_batch=1)}


def be_side(name, work, weights, root):
    """The process of a side: on the files of the project in `root`."""
    sys.path.insert(0, str(root))
    import torch

    from model import PRESETS
    model, step = SIDES[name](weights, STEPS[work][1], work.startswith("lora"))

    @torch.no_grad()
    def logits(ids):
        return model(torch.tensor(ids))
    serve(logits, lambda rows: (sum(len(ids) for ids, _ in rows), step(rows)),
          make_batches(32, PRESETS["microstories"].vocab_size))


# ---- the works ----

def compare_steps(work, args, root_of):
    """The sides of one work in turn, and their rows of the table."""
    title, _, names = STEPS[work]
    if args.side:
        names = ["ours", *[name for name in (*names[1:], *IF_NAMED) if name in args.side]]
    steps = args.steps or 3
    with tempfile.TemporaryDirectory() as folder:
        sides = []
        try:
            for name in names:  # ours first: it makes the weights
                sides.append(Side(name, __file__, "--be", json.dumps([name, work, str(Path(folder, "weights")),
                                                                      str(root_of.get(name, ROOT))])))
                ids = [[(31 * i + 17 * row) % 65024 for i in range(48)] for row in range(2)]
                if name == "ours":
                    compare_logits(sides, ids, {}, folder)
            compare_logits(sides, ids, {}, folder)
            compare_losses(sides)
            rates, peaks = take_turns(sides, args.rounds, steps)
        finally:
            for side in sides:
                side.close()
    print_rows(title, rates, peaks)


def pretraining(args, root_of):
    """pretrain.py, small, 16 x 512 tokens a step: each commit's variants in turn, and the best of each."""
    from common import write_jsonl

    from data.generate import stories
    steps = args.steps or 24
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    variants = {"ours": ((), ()), "ours, compiled": ((), ("--compile",)),
                "ours, 2 processes": (torchrun, ()), "ours, 2 processes, compiled": (torchrun, ("--compile",)),
                BEFORE: ((), ()), f"{BEFORE}, compiled": ((), ("--compile",))}  # which had no processes yet
    rates, peaks = {name: [] for name in variants}, dict.fromkeys(variants, 0)
    with tempfile.TemporaryDirectory() as folder:
        write_jsonl(Path(folder, "stories.jsonl"), ({"text": story["text"]} for story in stories(2000, 5)))
        for i in range(args.rounds):
            for name in list(variants)[::-1 if i % 2 else 1]:
                (launcher, flags), out = variants[name], Path(folder, "out")
                _, peak = run_command(
                    root_of[name.split(",")[0]], *launcher, "pretrain.py", "--data", Path(folder, "stories.jsonl"),
                    "--tokenizer", ROOT / "base", "--batch-size", 16, "--dtype", "bf16-mixed", "--val-fraction", 0.01,
                    "--max-steps", steps, "--eval-every", steps, "--out", out, "--overwrite", *flags)
                logged = [row["tokens_per_s"] for row in read_log(out) if "tokens_per_s" in row]
                rates[name].append(median(logged[len(logged) // 3:]))  # the first steps compile and warm up
                peaks[name] = max(peaks[name], peak)
                tell(f"  round {i + 1} of {args.rounds}: {name} {rates[name][-1]:,.0f} tokens/s")
    best = [max((name for name in variants if name.split(",")[0] == side), key=lambda name: median(rates[name]))
            for side in ("ours", BEFORE)]
    for name in variants:
        tell(f"  {name}: {median(rates[name]):,.0f} tokens/s")
    print_rows(f"small, pretraining, 16 x 512, bf16-mixed, the best of {len(variants)} commands",
               {name: rates[name] for name in best}, peaks)


def main_job(args, root_of):
    """The main job's command, whole: wall seconds with imports, compilation, validation and the eight cases."""
    seconds, peaks, done = {name: [] for name in root_of}, dict.fromkeys(root_of, 0), {}
    command = ["train_sft.py", "--lr", "5e-4", "--dtype", "bf16-mixed"]  # as README has it
    few = ["--max-steps", args.steps] if args.steps else []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.rounds):
            for name in list(root_of)[::-1 if i % 2 else 1]:
                out = Path(folder, "out")
                used, peak = run_command(root_of[name], *command, *few, "--out", out, "--overwrite")
                seconds[name].append(used)
                peaks[name], done[name] = max(peaks[name], peak), sum("loss" in row for row in read_log(out))
                tell(f"  round {i + 1} of {args.rounds}: {name} {used:.1f} s")
    print_rows("small, the main job", seconds, peaks, "s", ".1f",
               {name: f", {done[name]} steps" for name in done})


def read_log(out):
    """-> the rows of a run's log.jsonl."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--be"]:
        return be_side(*json.loads(argv[1]))
    parser = bench_parser("Speed of training beside other tools", WORKS,
                          "of a side in a round (default: 3 of the 44M model, 24 of pretraining, all of the main job)")
    parser.add_argument("--side", nargs="+", choices=SIDES, help="only these beside ours (default: all)")
    args = parser.parse_args(argv)
    with roots() as root_of:
        print_header()
        for work in args.work:
            tell(work)
            {"pretrain": pretraining, "main-job": main_job}.get(work, lambda *_, w=work: compare_steps(w, *_))(
                args, root_of)


if __name__ == "__main__":
    from bench.train import main
    main()
