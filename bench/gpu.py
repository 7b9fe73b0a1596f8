"""How fast does pretraining go on a GPU, beside plain PyTorch? python bench/gpu.py

The 44M preset at bf16-mixed with its own batch and micro-batches, random tokens. The peer is the same model in the loop
that people write by hand (nanoGPT's): logits of all tokens, F.cross_entropy, the whole model under torch.compile, AdamW
fused, clipping, and no waiting for the GPU. Both must compute the same logits and the same first loss; they take turns.
"""
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import fail, positive  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from bench.train import LR, our_step  # noqa: E402
from bench.turns import (  # noqa: E402
    Side,
    bench_parser,
    compare_logits,
    compare_losses,
    print_header,
    print_rows,
    serve,
    take_turns,
    tell,
)
from model import GPT, PRESETS  # noqa: E402
from pretrain import SETTINGS  # noqa: E402
from train_sft import compile_model  # noqa: E402

PRESET = "microstories"
SIDES = ("ours, --compile", "ours", "plain, compiled", "plain")


def plain_step(model, compiled):
    """-> step(micro-batches (x, y)) -> mean loss, as in nanoGPT's train.py."""
    def forward(x, y):
        logits = model(x)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))
    run = torch.compile(forward) if compiled else forward
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), fused=True)

    def step(micro_batches):
        total = 0
        for batch in micro_batches:
            x, y = (ids.pin_memory().to("cuda", non_blocking=True) for ids in batch)
            with torch.autocast("cuda", torch.bfloat16):
                loss = run(x, y) / len(micro_batches)
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total
    return step


def be_side(name):
    """The process of a side."""
    torch.manual_seed(0)
    config, settings = PRESETS[PRESET], SETTINGS[PRESET]
    model = GPT(config).cuda()
    if name.startswith("ours"):
        if "--compile" in name:
            compile_model(model)
        step = our_step(model, "bf16-mixed")
    else:
        step = plain_step(model, "compiled" in name)
    rows = torch.randint(config.vocab_size, (4, settings["batch_size"], config.block_size + 1))
    batches = [[(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in rows] * (settings["grad_accum"] // len(rows))]

    def timed(micro_batches):
        loss = float(step(micro_batches))  # the one wait of a step, at its end
        return sum(x.numel() for x, _ in micro_batches), loss

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def logits(ids):
        return model(torch.tensor(ids, device="cuda")).cpu()
    serve(logits, timed, batches)


def product_speed(n=8192, times=20):
    """FLOP/s of bfloat16 products of n x n matrices, random numbers."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return 2 * n ** 3 / median(seconds)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--be"]:
        return be_side(argv[1])
    parser = bench_parser("Speed of pretraining on a GPU beside plain PyTorch", (), "of a side in a round (default: 2)")
    parser.add_argument("--peak", type=positive(float), help="TFLOP/s of bfloat16 that MFU is a share of, from the "
                                                             "GPU's data sheet (default: those of large products here)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        fail("this benchmark needs a GPU")
    speed = product_speed()
    tell(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}; products at {speed / 1e12:,.0f} TFLOP/s")
    peak = args.peak * 1e12 if args.peak else speed
    config = PRESETS[PRESET]
    with torch.device("meta"):
        parameters = GPT(config).num_params()
    flop = 6 * parameters + 12 * config.n_layer * config.n_head * config.head_size * config.block_size  # of a token
    sides = [Side(name, __file__, "--be", name, env={}) for name in SIDES]
    try:
        with tempfile.TemporaryDirectory() as folder:
            compare_logits(sides, [[(31 * i + 17 * row) % config.vocab_size for i in range(48)] for row in range(2)],
                           {}, folder)
        compare_losses(sides)  # compiles
        for side in sides:
            side.ask(steps=2)  # warms up
        rates, peaks = take_turns(sides, args.rounds, args.steps or 2)
    finally:
        for side in sides:
            side.close()
    print_header()
    print_rows(f"44M, pretraining, {SETTINGS[PRESET]['grad_accum']} x {SETTINGS[PRESET]['batch_size']} x "
               f"{config.block_size}, bf16-mixed", rates, peaks,
               notes={name: f", MFU {flop * median(values) / peak:.0%}" for name, values in rates.items()})


if __name__ == "__main__":
    from bench.gpu import main
    main()
