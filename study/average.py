"""Average the weights of models: python average.py out/sft_more out/sft_last --out out/sft_mean

Models that were trained from each other often lie in one valley, and their mean lower in it than either (Wortsman et
al. 2022, "Model soups"). Models of different origin have no such mean.
"""
import argparse
from pathlib import Path

import torch

from checkpoint import load_model, save_model
from common import fail


def average(directories):
    """Model directories -> (GPT, Tokenizer) with the mean of their weights, in float32.

    Raises ValueError naming the directory whose model or tokenizer is another one than the first's.
    """
    first, *others = directories
    model, tokenizer = load_model(first)
    model.float()
    with torch.no_grad():
        for n, directory in enumerate(others, start=2):
            other, its_tokenizer = load_model(directory)
            if other.config != model.config:
                raise ValueError(f"{directory}: its config.json describes another model than {first}'s")
            if its_tokenizer.files["tokenizer.model"] != tokenizer.files["tokenizer.model"]:
                raise ValueError(f"{directory}: its tokenizer is another one than {first}'s")
            for mean, p in zip(model.parameters(), other.parameters()):
                mean.lerp_(p.float(), 1 / n)
    return model, tokenizer


def main(argv=None):
    parser = argparse.ArgumentParser(description="Average the weights of models trained from each other.")
    parser.error = fail
    parser.add_argument("models", type=Path, nargs="+", help="model directories, two or more")
    parser.add_argument("--out", type=Path, required=True, help="directory of the averaged model; must not exist yet")
    args = parser.parse_args(argv)
    try:
        if len(args.models) < 2:
            raise ValueError("one model has no average: name two or more")
        if args.out.exists():
            raise ValueError(f"--out {args.out} is there already")
        save_model(args.out, *average(args.models))
    except (ValueError, OSError) as e:
        fail(e)
    print(f"the mean of {len(args.models)} models: {args.out}")


if __name__ == "__main__":
    main()
