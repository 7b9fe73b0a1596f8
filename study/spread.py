"""Tell the rare pieces of a model apart again: python study/spread.py out/base out/spread

The embeddings of pieces that a corpus hardly has end up in one place: whatever comes, their gradient says "less of it",
all of them the same, and Adam, which divides a gradient by its size, makes large steps of the smallest ones (Gao et al.
2019, arXiv 1907.12009; Stollenwerk and Stollenwerk 2025, arXiv 2502.08441). Where head and embedding are one matrix, a
model that copies then takes 播 for 忆. So each embedding is split into its part along the mean of all, which says how
rare the piece is, and a rest, which says what piece it is. A rest that is shorter than that of three quarters of the
pieces is lengthened to it. Pieces that the corpus never has end up with one and the same rest, however long: theirs are
drawn at random. The keys of instructions are among them, and where they cannot be told apart no instruction can be.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import command_line, fail, new_directory  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from checkpoint import load_model, save_model  # noqa: E402

SAME = 0.99  # cosine of two rests that are one


def spread(embeddings, seed=1337):
    """(V, C) -> (V, C), float32: no two rests the same, every one at least as long as the upper quartile."""
    embeddings = embeddings.float()
    mean = F.normalize(embeddings.mean(0), dim=0)         # (C,)
    along = (embeddings @ mean)[:, None] * mean           # (V, C)
    rest = embeddings - along
    usual = rest.norm(dim=1).quantile(0.75)
    drawn = torch.randn(rest.shape, generator=torch.Generator().manual_seed(seed)).to(rest)
    drawn = F.normalize(drawn - (drawn @ mean)[:, None] * mean, dim=1) * usual
    rest = torch.where((nearest(rest) > SAME)[:, None], drawn, rest)
    return along + rest * (usual / rest.norm(dim=1, keepdim=True).clamp(min=1e-8)).clamp(min=1.0)


def nearest(embeddings):
    """(V, C) -> (V,): the cosine of each piece to the one that is most like it."""
    directions = F.normalize(embeddings.float(), dim=1)
    nearest_two = [(some @ directions.T).topk(2, dim=1).values for some in directions.split(1024)]
    return torch.cat(nearest_two)[:, 1]  # the first one is the piece itself


def main(argv=None):
    parser = command_line("Tell the rare pieces of a model apart again.")
    parser.add_argument("model", type=Path, help="model directory")
    parser.add_argument("out", type=Path, help="where the model goes")
    args = parser.parse_args(argv)
    try:
        if args.out.exists():
            raise ValueError(f"{args.out} is there already")
        model, tokenizer = load_model(args.model)
        if not model.config.tie_embeddings:
            raise ValueError("the model's head is not tied to its embedding")
        weight = model.lm_head.weight.data
        before = nearest(weight)
        weight.copy_(spread(weight))
        with new_directory(args.out) as work:
            save_model(work, model, tokenizer)
    except (ValueError, OSError) as e:
        fail(e)
    for name, cosines in (("before", before), ("after", nearest(weight))):
        print(f"{name}: cosine to the nearest piece, median {cosines.median():.3f}, upper quartile "
              f"{cosines.quantile(0.75):.3f}")


if __name__ == "__main__":
    from study.spread import main
    main()
