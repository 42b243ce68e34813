#!/usr/bin/env bash
# The paper's training (its appendix A.5): 300 epochs of 14,886 pictures, 16 crops of 384 pixels a step, Adam at 1e-4.
# Its random mask before that is left out (--pretrain SHARE adds it, of the steps; the paper does not say how many).
# One model for each lambda. The paper names 0.02, for table 1 and figures 6 and 7; these are CompressAI's and begin at
# low rates.
#
#   DATA=shards/manifest.json bash recipes/paper.sh
#
# Needs: packed pictures with at least 384 pixels on both sides (docs/scaling.md, Packing), and one H100 or like it.
# Time: 6.8 hours on one H100 for each lambda, simulated (docs/scaling.md, What training costs).
# Memory: not measured at this size. A batch that is too large ends with a sentence that says which ACCUMULATE fits.
# Result: OUT/LAMBDA/weights.safetensors, a model like the paper's.
# Several GPUs of one machine: RUN="torchrun --nproc-per-node 8 -m entroformer_lib". Slurm: paper.sbatch.
# The same command goes on with what was stopped. PRESET=official is the network as the authors released it.
set -euo pipefail

RUN=${RUN:-entroformer}
DATA=${DATA:?set DATA to the pictures}
OUT=${OUT:-runs/paper}
SIZE=${SIZE:-base}
VARIANT=${VARIANT:-serial}
PRESET=${PRESET:-paper}
LMBDAS=${LMBDAS:-0.0018 0.0035 0.0067 0.013 0.025 0.0483}
BATCH=${BATCH:-16}
CROP=${CROP:-384}
STEPS=${STEPS:-$((300 * 14886 / BATCH))}

for lmbda in $LMBDAS; do
    $RUN train --data "$DATA" --out "$OUT/$lmbda" --model "$SIZE-$VARIANT" --preset "$PRESET" --lmbda "$lmbda" \
        --steps "$STEPS" --batch "$BATCH" --accumulate "${ACCUMULATE:-1}" --crop "$CROP" --optimizer adam --lr 1e-4 \
        --schedule steps --precision "${PRECISION:-bfloat16}" --no-preload --workers "${WORKERS:-4}"
done
