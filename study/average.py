"""Average the weights of models: python study/average.py out/sft_more out/sft_last --out out/sft_mean

Models that were trained from each other often lie in one valley of the loss, and their mean lower in it than either
(Wortsman et al. 2022, "Model soups"). Models of different origin have no such mean.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import check_writable, command_line, fail, new_directory  # noqa: E402

import torch  # noqa: E402

from checkpoint import load_model, save_model  # noqa: E402


@torch.no_grad()
def interpolate(model, other, share):
    """Move the weights of `model`, in place and in float32, by this share of the way to those of `other`."""
    model.float()
    for p, target in zip(model.parameters(), other.parameters()):
        p.lerp_(target.to(p), share)


def average(directories):
    """Model directories -> (GPT, Tokenizer) with the mean of their weights, in float32.

    Raises ValueError naming the directory whose model or tokenizer differs from the first one's.
    """
    first, *others = directories
    model, tokenizer = load_model(first)
    for n, directory in enumerate(others, start=2):
        other, its_tokenizer = load_model(directory)
        if other.config != model.config:
            raise ValueError(f"{directory}: its config.json describes another model than {first}'s")
        if its_tokenizer.identity != tokenizer.identity:
            raise ValueError(f"{directory}: its tokenizer is not that of {first}")
        interpolate(model, other, 1 / n)  # the mean so far counts n - 1 times
    return model, tokenizer


def parse_args(argv=None):
    parser = command_line("Average the weights of models trained from each other.")
    parser.add_argument("models", type=Path, nargs="+", help="model directories, two or more")
    parser.add_argument("--out", type=Path, required=True, help="directory of the averaged model; must not exist yet")
    args = parser.parse_args(argv)
    if len(args.models) < 2:
        parser.error("one model has no average: name two or more")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.out.exists():
            raise ValueError(f"--out {args.out} is there already")
        check_writable(args.out)
        model, tokenizer = average(args.models)
        with new_directory(args.out) as directory:
            save_model(directory, model, tokenizer)
    except (ValueError, OSError) as e:
        fail(e)
    print(f"the mean of {len(args.models)} models: {args.out}")


if __name__ == "__main__":
    from study.average import main
    main()
