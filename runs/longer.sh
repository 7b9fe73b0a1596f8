#!/usr/bin/env bash
# The longer recipe: more instructions than the main job has, first the openings of stories, then whole stories.
#
#     bash runs/longer.sh
#     PYTHON=.venv/bin/python bash runs/longer.sh
#
# About half an hour on 2 CPU cores with bfloat16 units. Afterwards the model is in out/sft_mid. A run that is already in
# out/ is not replaced: delete it, or continue it with `python train_sft.py --resume --out out/sft_short` (or
# out/sft_mid). The results: docs/results.md; why it is done this way: docs/log.md.
set -euo pipefail
cd "$(dirname "$0")/.."  # it may be called from anywhere; all paths below are the project's
PYTHON=${PYTHON:-python}

# Seeds 4 and 2 are for training. What models are judged by has other seeds: see data/builtin.py.

# 1. Openings. Which story to tell is decided in its first sentences, and a row that is cut there costs a
#    quarter of a whole one. Rows with a summary are left out: it gives the story away, and without it the model has to
#    read words and sentence. --slot-words: 词汇 lists words that nothing else in the row reveals, so that copying pays.
"$PYTHON" data/generate.py --n 100000 --seed 4 --slot-words \
    --out out/short/stories.jsonl --instructions out/short/all.jsonl
grep -v 摘要 out/short/all.jsonl > out/short/train.jsonl
"$PYTHON" train_sft.py --data out/short --epochs 1 --val-fraction 0.01 --block-size 64 --batch-size 64 --lr 1e-3 \
    --dtype bf16-mixed --out out/sft_short

# 2. Whole stories, from the model of step 1. --more-sentences: 随机句子 lists one to half of a story's
#    sentences instead of one, so that copying pays several times a story.
"$PYTHON" data/generate.py --n 25000 --seed 2 --slot-words --more-sentences \
    --out out/mid/stories.jsonl --instructions out/mid/train.jsonl
"$PYTHON" train_sft.py --init out/sft_short --data out/mid --epochs 1 --val-fraction 0.02 --lr 5e-4 \
    --dtype bf16-mixed --eval-every 520 --out out/sft_mid

# 3. Does it follow instructions? A table, and out/sft_mid/eval.json.
"$PYTHON" evaluate.py --ckpt out/sft_mid
