#!/usr/bin/env bash
# The longer recipe: four times as many stories as the main job has, one pass, and a table of what comes of it.
#
#     bash runs/longer.sh
#     PYTHON=.venv/bin/python bash runs/longer.sh
#
# Afterwards the model is in out/sft_long. A run that is already there is not replaced: delete it, or continue it with
# `python train_sft.py --resume --out out/sft_long`. The results: docs/results.md.
set -euo pipefail
cd "$(dirname "$0")/.."  # it may be called from anywhere; all paths below are the project's
PYTHON=${PYTHON:-python}

# Seed 5 is for training. What models are judged by has other seeds: see data/builtin.py.
"$PYTHON" data/generate.py --n 24000 --seed 5 --out out/long/stories.jsonl --instructions out/long/train.jsonl
"$PYTHON" train_sft.py --data out/long --epochs 1 --val-fraction 0.01 --lr 5e-4 --dtype bf16-mixed --out out/sft_long
"$PYTHON" evaluate.py --ckpt out/sft_long
