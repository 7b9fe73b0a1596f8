"""What could this machine do at most, and how close does a training step come? python bench/floor.py

Measures matrix products at the shapes of a training step, and memory bandwidth; divides by the arithmetic of a token
(6 FLOP for each parameter that is multiplied, and attention); and times our step, forward to optimizer, beside it.
"""
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import command_line, has_bf16, positive  # noqa: E402

import torch  # noqa: E402

from bench.train import make_batches, our_step  # noqa: E402
from bench.turns import tell  # noqa: E402
from dataset import collate  # noqa: E402
from model import GPT, IGNORE, PRESETS  # noqa: E402
from train_sft import compile_model  # noqa: E402

ADAMW_BYTES = 28  # for each parameter: weight, gradient and two moments are read, all but the gradient written, float32


def best_time(function, seconds=0.3):
    """Seconds that function() takes, the best of as many calls as fit, at least 3, after one to warm up."""
    function()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def bandwidth(size):
    """Bytes/s that a copy of `size` bytes reads and writes."""
    source = torch.ones(size // 4)
    target = torch.empty_like(source)
    return 2 * size / best_time(lambda: target.copy_(source))


def cache_size():
    """Bytes of the last-level cache (Linux); 64 MB where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max([int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes], default=64 * 2**20)


def product_shapes(model, tokens, supervised):
    """-> [(rows N, in, out)] of every Linear in a step of so many tokens; the head sees the supervised ones alone."""
    return [(supervised if linear is model.lm_head else tokens, linear.in_features, linear.out_features)
            for linear in model.modules() if isinstance(linear, torch.nn.Linear)]


def product_speed(shapes, dtype):
    """FLOP/s of the products of these Linears, forward and both gradients, each shape timed once."""
    flop = seconds = 0
    for N, n_in, n_out in set(shapes):
        x, w, dy = (torch.randn(shape, dtype=dtype) for shape in ((N, n_in), (n_out, n_in), (N, n_out)))
        y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(w)
        times = [best_time(product) for product in (lambda: torch.mm(x, w.T, out=y),  # noqa: B023
                                                    lambda: torch.mm(dy, w, out=dx),  # noqa: B023
                                                    lambda: torch.mm(dy.T, x, out=dw))]  # noqa: B023
        count = shapes.count((N, n_in, n_out))
        flop += count * 6 * N * n_in * n_out
        seconds += count * sum(times)
    return flop / seconds


def step_speed(model, batches, precision, compile, tokens):
    """-> tokens/s of each of our training steps, the first two left out."""
    if compile:
        compile_model(model)
    step = our_step(model, precision)
    rates = []
    for batch in batches:
        start = time.perf_counter()
        step([batch])
        rates.append(tokens(batch) / (time.perf_counter() - start))
    return rates[2:]


def works(steps):
    """-> [(title, preset, batches (x, y), tokens of a batch)]: pretraining of small, fine-tuning of the 44M model."""
    plain = torch.randint(PRESETS["small"].vocab_size, (16, 513))
    rows = make_batches(steps + 2, PRESETS["microstories"].vocab_size)
    ragged = [collate(some) for some in rows]
    lengths = {id(batch): sum(len(ids) for ids, _ in some) for batch, some in zip(ragged, rows)}
    return [("small, 16 x 512", "small", [(plain[:, :-1], plain[:, 1:])] * (steps + 2), lambda batch: batch[0].numel()),
            ("44M, 8 ragged rows", "microstories", ragged, lambda batch: lengths[id(batch)])]


def main(argv=None):
    parser = command_line("The machine's floor, and the share of it that a training step reaches.")
    parser.add_argument("--steps", type=positive(int), default=5, help="timed steps (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    cache = cache_size()
    far = bandwidth(min(4 * cache, 2 * 2**30))
    print(f"{torch.get_num_threads()} threads; a copy reads and writes {far / 1e9:.1f} GB/s in memory, "
          f"{bandwidth(min(8 * 2**20, cache // 4)) / 1e9:.1f} GB/s in the last-level cache ({cache / 2**20:.0f} MB)\n")
    print("| work | precision | products, GFLOP/s | MFLOP a token | products alone, tokens/s | and AdamW's bytes | "
          "our step, tokens/s | share of the products' |\n|---|---|---|---|---|---|---|---|")
    for title, preset, batches, tokens_of in works(args.steps):
        for name, dtype in (("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)):
            if dtype == torch.bfloat16 and not has_bf16(torch.device("cpu")):
                continue
            model, config = GPT(PRESETS[preset]), PRESETS[preset]
            tokens = sum(map(tokens_of, batches)) // len(batches)
            supervised = sum((y != IGNORE).sum().item() for _, y in batches) // len(batches)
            shapes = product_shapes(model, tokens, supervised)
            tell(f"{title}, {name}: {len(set(shapes))} shapes")
            speed = product_speed(shapes, dtype)
            # q kᵀ and its product with v: 4 T D a head and token, three times that with their gradients; T on average
            T = sum(x.size(1) for x, _ in batches) / len(batches)
            attention = 12 * config.n_layer * config.n_head * config.head_size * T
            flop = sum(6 * N * n_in * n_out for N, n_in, n_out in shapes) / tokens + attention
            seconds = flop * tokens / speed
            both = seconds + ADAMW_BYTES * model.num_params() / far
            own = median(step_speed(model, batches, name, args.compile, tokens_of))
            print(f"| {title} | {name} | {speed / 1e9:,.0f} | {flop / 1e6:.0f} | {tokens / seconds:,.0f} | "
                  f"{tokens / both:,.0f} | {own:,.0f} | {own * seconds / tokens:.0%} |", flush=True)


if __name__ == "__main__":
    from bench.floor import main
    main()
