#!/usr/bin/env bash
# The fast transforms: blocks at an eighth of the resolution beside a linear path that begins as a DCT, one model for nine
# lambdas, Muon. First with a constant learning rate, then a branch in which it goes to zero (docs/weights.md).
#
#   DATA=shards/manifest.json bash recipes/fast.sh
#
# Needs: packed pictures with at least 256 pixels on both sides, and one H100 or like it; SIZE=tiny CROP=128 also
# learns on a CPU, where it was tried.
# Time: 1.4 hours on one H100 with SIZE=base, simulated (docs/scaling.md, What training costs).
# Memory: less than that of paper.sh, whose crops are larger. What is too large ends with a sentence that says which
# ACCUMULATE fits.
# Result: OUT/cooled/weights.safetensors. OUT/constant/checkpoint.pt may go on: give more STEPS and another COOLED.
set -euo pipefail

RUN=${RUN:-entroformer}
DATA=${DATA:?set DATA to the pictures}
OUT=${OUT:-runs/fast}
COOLED=${COOLED:-$OUT/cooled}
SIZE=${SIZE:-base}
VARIANT=${VARIANT:-parallel}
STAGES=${STAGES:-[[8,256,6]]}
LMBDAS=${LMBDAS:-0.00035 0.0008 0.0017 0.0035 0.007 0.014 0.029 0.06 0.12}
STEPS=${STEPS:-200000}
COOLING=${COOLING:-$(((STEPS + 9) / 10))} # steps of the branch

both=(--data "$DATA" --batch "${BATCH:-16}" --accumulate "${ACCUMULATE:-1}" --crop "${CROP:-256}" --optimizer muon
    --lr "${LR:-1e-3}" --precision bfloat16 --graphics 0.06 --permuted 0.05 --no-preload --workers "${WORKERS:-4}")

$RUN train --out "$OUT/constant" "${both[@]}" --model "$SIZE-$VARIANT" --lmbdas $LMBDAS --steps "$STEPS" --schedule constant \
    --architecture transforms=blocks "stages=$STAGES" linear_path=dct M=320 rate_aware=true
$RUN train --out "$COOLED" "${both[@]}" --branch "$OUT/constant/checkpoint.pt" --steps "$COOLING" --schedule decay
