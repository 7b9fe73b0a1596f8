"""Give a model another tokenizer: python study/revocabulary.py base out/tok/tokenizer.model out/widened

The layers are kept. A piece that the old tokenizer also has keeps its embedding; any other gets the mean of the
embeddings of the old pieces that spell it. Those that are of bytes come out much alike: tell them apart (spread.py).
Then continue pretraining from there (`pretrain.py --init`).
"""
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import command_line, fail, new_directory  # noqa: E402

import torch  # noqa: E402

import tokenizer as tokenizers  # noqa: E402
from checkpoint import load_model, save_model  # noqa: E402
from model import GPT  # noqa: E402


def spelling(piece_id, new, old):
    """The old ids that stand for a piece of the new tokenizer: its own, or those that spell it. Bytes and specials
    have the same names in both."""
    piece = new.sp.id_to_piece(piece_id)
    if (same := old.sp.piece_to_id(piece)) != old.sp.unk_id() or piece == old.sp.id_to_piece(old.sp.unk_id()):
        return [same]
    return old.encode(new.decode([piece_id])) or [old.sp.unk_id()]


@torch.no_grad()
def revocabulary(model, old, new):
    """-> the model, in float32, with the vocabulary of the tokenizer `new`. Raises ValueError for a head of its own."""
    if not model.config.tie_embeddings:
        raise ValueError("the model's head is not tied to its embedding")
    widened = GPT(replace(model.config, vocab_size=new.vocab_size))
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    before = weights["model.embed_tokens.weight"]
    after = torch.stack([before[spelling(i, new, old)].mean(0) for i in range(new.vocab_size)])
    widened.load_state_dict(weights | {"model.embed_tokens.weight": after, "lm_head.weight": after})
    return widened


def main(argv=None):
    parser = command_line("Give a model another tokenizer.")
    parser.add_argument("model", type=Path, help="model directory")
    parser.add_argument("tokenizer", type=Path, help="tokenizer.model")
    parser.add_argument("out", type=Path, help="where the model goes")
    args = parser.parse_args(argv)
    try:
        if args.out.exists():
            raise ValueError(f"{args.out} is there already")
        model, old = load_model(args.model)
        new = tokenizers.load(args.tokenizer)
        with new_directory(args.out) as work:
            save_model(work, revocabulary(model, old, new), new)
    except (ValueError, OSError) as e:
        fail(e)


if __name__ == "__main__":
    from study.revocabulary import main
    main()
