"""How much faster is a step of LoRA than a step of full fine-tuning? python bench/lora_speed.py --preset microstories

Both take turns in one process, on the same random batch, so that what else the machine does hits them alike. A step is
the loop's: forward, backward, clipping, AdamW, in bf16-mixed.
"""
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import command_line, pick_device, positive  # noqa: E402

import torch  # noqa: E402
from tqdm import trange  # noqa: E402

import lora  # noqa: E402
from bench.train import our_step  # noqa: E402
from model import GPT, IGNORE, PRESETS  # noqa: E402


def parse_args(argv=None):
    parser = command_line("Time of a step: full fine-tuning against LoRA.")
    flag = parser.add_argument
    flag("--preset", choices=PRESETS, default="small", help="(default: %(default)s)")
    flag("--r", type=positive(int), nargs="+", default=[8, 64, 256], help="ranks, on all Linears (default: 8 64 256)")
    flag("--rows", type=positive(int), default=16, help="of 256 tokens (default: %(default)s)")
    flag("--steps", type=positive(int), default=10, help="timed steps of each (default: %(default)s)")
    return parser.parse_args(argv)


def stepper(preset, r, batch, device):
    """-> a function that makes one step, and the number of trainable parameters. r None: full fine-tuning."""
    torch.manual_seed(0)
    model = GPT(PRESETS[preset]).to(device)
    if r:
        lora.add(model, lora.TARGETS["all-linear"], r, 2 * r)
    one_step = our_step(model, "bf16-mixed")

    def step():
        one_step([batch])
        if device.type == "cuda":
            torch.cuda.synchronize()
    return step, sum(p.numel() for p in model.parameters() if p.requires_grad)


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(None)
    x = torch.randint(PRESETS[args.preset].vocab_size, (args.rows, 256))
    y = x.roll(-1, 1)
    y[:, :40] = IGNORE  # as under a prompt
    steps = {r: stepper(args.preset, r, (x, y), device) for r in (None, *args.r)}
    times = {r: [] for r in steps}
    for _ in trange(args.steps + 1, unit="round"):
        for r, (step, _) in steps.items():
            start = time.perf_counter()
            step()
            times[r].append(time.perf_counter() - start)
    full = statistics.median(times[None][1:])
    for r, (_, trainable) in steps.items():
        own = statistics.median(times[r][1:])
        print(f"{f'LoRA r={r}' if r else 'full':<12}{trainable:>12,} trainable{own * 1000:9.0f} ms a step"
              f"{full / own:8.2f} x as fast as full")


if __name__ == "__main__":
    from bench.lora_speed import main
    main()
