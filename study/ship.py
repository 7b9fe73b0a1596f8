"""Make base/ from a pretraining run: python study/ship.py out/base

The weights in bfloat16, the tokenizer, the loss curve, and corpus.json: what it was trained on, with checksums.
"""
import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import command_line, fail, write_json  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from checkpoint import load_model, save_model  # noqa: E402
from data import books, builtin, generate  # noqa: E402
from data.builtin import SEEDS  # noqa: E402


def sha256(texts):
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def describe(run, tokenizer):
    """-> the dict of corpus.json for a run directory of pretrain.py."""
    file = run / "tokens" / "train.bin"
    tokens = np.fromfile(file, tokenizer.dtype)
    settings = json.loads((run / "args.json").read_text(encoding="utf-8"))
    steps = json.loads((run / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"]
    read = steps * settings["batch_size"] * settings["grad_accum"] * settings["block_size"]  # tokens
    seed = SEEDS["pretraining"]
    return {
        "version": generate.VERSION, "texts": builtin.BOOKS, "exercises": builtin.EXERCISES, "seed": seed,
        "tokens": len(tokens), "epochs": round(read / len(tokens), 2),
        "characters": sum(len(tokenizer.decode(part.tolist())) for part in np.array_split(tokens, 1000)),
        "sha256_of_token_file": hashlib.sha256(file.read_bytes()).hexdigest(),
        "sha256_of_first_1000_texts": sha256(books.texts(1000, seed)),
        "sha256_of_first_1000_exercises": sha256(books.exercises(1000, seed)),
        "sha256_of_heldout_stories": sha256(r["output"] for r in builtin.held_out_instructions()),
    }


def main(argv=None):
    parser = command_line("Make base/ from a run of pretrain.py with its default data.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--out", type=Path, default=ROOT / "base", help="(default: base/)")
    args = parser.parse_args(argv)
    try:
        model, tokenizer = load_model(args.run)
        corpus = describe(args.run, tokenizer)
        save_model(args.out, model.to(torch.bfloat16), tokenizer)
        shutil.copy(args.run / "loss.png", args.out)
        write_json(args.out / "corpus.json", corpus)
    except (ValueError, OSError) as e:
        fail(e)


if __name__ == "__main__":
    from study.ship import main
    main()
