"""Make base/ of a pretrained run: python base/ship.py out/base

The weights in bfloat16, the tokenizer, the curve, and corpus.json: what it was trained on, with checksums.
"""
import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import pretrain  # noqa: E402
from checkpoint import load_model, save_model  # noqa: E402
from common import fail  # noqa: E402
from data import books, generate  # noqa: E402


def sha256(texts):
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make base/ of a run of pretrain.py with its default data.")
    parser.error = fail
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--out", type=Path, default=ROOT / "base", help="(default: base/)")
    args = parser.parse_args(argv)
    try:
        model, tokenizer = load_model(args.run)
        file = args.run / "tokens" / "train.bin"
        tokens = np.fromfile(file, np.uint16)
        settings = json.loads((args.run / "args.json").read_text(encoding="utf-8"))
        steps = json.loads((args.run / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"]
        read = steps * settings["batch_size"] * settings["grad_accum"] * settings["block_size"]  # tokens
        held_out = [record["text"] for record in generate.stories(100, 99, held_out=True)]
        corpus = {
            "version": generate.VERSION, "texts": pretrain.BUILTIN_TEXTS,
            "exercises": pretrain.BUILTIN_EXERCISES, "seed": pretrain.BUILTIN_SEED, "tokens": len(tokens),
            "epochs": round(read / len(tokens), 2),
            "characters": sum(len(tokenizer.decode(part.tolist())) for part in np.array_split(tokens, 1000)),
            "sha256_of_token_file": hashlib.sha256(file.read_bytes()).hexdigest(),
            "sha256_of_first_1000_texts": sha256(books.texts(1000, pretrain.BUILTIN_SEED)),
            "sha256_of_first_1000_exercises": sha256(books.exercises(1000, pretrain.BUILTIN_SEED)),
            "sha256_of_heldout_stories": sha256(held_out),
        }
        save_model(args.out, model.to(torch.bfloat16), tokenizer)
        shutil.copy(args.run / "loss.png", args.out)
    except (ValueError, OSError) as e:
        fail(e)
    write_atomic(args.out / "corpus.json", lambda p: p.write_text(json.dumps(corpus, indent=2) + "\n", "utf-8"))


if __name__ == "__main__":
    main()
