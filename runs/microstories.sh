#!/usr/bin/env bash
# The study's geometry on the built-in world: 43.9M parameters, three quarters of them the embedding of 65,024 pieces
# (as many of them as the text yields, the rest padding). For a GPU with bfloat16; on two CPU cores it takes days.
#
#     bash runs/microstories.sh
#     PYTHON=.venv/bin/python bash runs/microstories.sh
#
# Afterwards the base is in out/microstories/base, the fine-tuned model in out/microstories/sft. Tokens/s of each step
# are in their log.jsonl; tokens/s and MFU of this model beside plain PyTorch: python bench/gpu.py. Runs that are there
# already are not replaced: delete them, or continue them with --resume. The texts, once written, are used again.
# BOOKS, PRETRAIN, SFT and EVALUATE: how many texts, and further flags, for another size.
set -euo pipefail
cd "$(dirname "$0")/.."  # it may be called from anywhere; all paths below are the project's
PYTHON=${PYTHON:-python}
BOOKS=${BOOKS:-240000}
PRETRAIN=${PRETRAIN:---compile}
SFT=${SFT:---compile}
OUT=${OUT:-out/microstories}
CORES=$(nproc)

# Writing the texts takes longest: a part for each core, of seeds that nothing is judged by (data/builtin.py).
if [ ! -f "$OUT/books.jsonl" ]; then
    rm -rf "$OUT/books"
    mkdir -p "$OUT/books"
    trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
    parts=()
    for i in $(seq "$CORES"); do
        "$PYTHON" data/books.py --n $(((BOOKS + CORES - 1) / CORES)) --seed $((1000 + i)) --out "$OUT/books/$i.jsonl" &
        parts+=($!)
    done
    for part in "${parts[@]}"; do wait "$part"; done
    cat "$OUT"/books/*.jsonl > "$OUT/books.part"
    mv "$OUT/books.part" "$OUT/books.jsonl"
fi

# The study's batches of 512 x 512 tokens would leave too few steps here.
"$PYTHON" pretrain.py --preset microstories --data "$OUT/books.jsonl" --grad-accum 1 --warmup 100 --epochs 4 \
    --dtype bf16-mixed --out "$OUT/base" $PRETRAIN
"$PYTHON" train_sft.py --init "$OUT/base" --lr 5e-4 --dtype bf16-mixed --out "$OUT/sft" $SFT
"$PYTHON" sample.py --ckpt "$OUT/sft"
"$PYTHON" evaluate.py --ckpt "$OUT/sft" --base "$OUT/base" ${EVALUATE:-}
