#!/usr/bin/env bash
# Entropy models that differ in nothing else: behind the same frozen transforms, on the same latents in the same order.
# The last third of the steps trains the rate of rounded latents, which is what files hold (docs/training.md).
#
#   DATA=photos bash recipes/family.sh
#
# Needs: a model whose transforms are taken (TRANSFORMS), pictures with at least 256 pixels on both sides, and 0.4 MB of
# disk a picture (four crops of 256 pixels, 192 channels).
# Time: 4 to 41 minutes a variant and 3 hours for all, measured on one CPU core at size tiny.
# Memory: 1.4 GB on a CPU, measured at size tiny with GroupedMixer, which takes most.
# HELD_OUT=list.txt names pictures that are left out; their rate is in each log.
# Result: OUT/VARIANT/weights.safetensors. All decode the same pictures, so their rates can be divided.
set -euo pipefail

RUN=${RUN:-entroformer}
DATA=${DATA:?set DATA to the pictures}
OUT=${OUT:-runs/family}
SIZE=${SIZE:-tiny}
TRANSFORMS=${TRANSFORMS:-tiny-rates}
VARIANTS=${VARIANTS:-serial parallel groupedmixer cnn minnen hyperprior hyperprior-cnn context context-cnn}
CROP=${CROP:-256}
STEPS=${STEPS:-4500}
ROUNDED=$(((STEPS + 2) / 3))

python -m entroformer_lib.training.latents --transforms "$TRANSFORMS" --data "$DATA" --out "$OUT/latents" --crop "$CROP" \
    ${HELD_OUT:+--held-out "$HELD_OUT"}
both=(--data "$DATA" --transforms "$TRANSFORMS" --latents "$OUT/latents" --crop "$CROP" --batch "${BATCH:-8}"
    --optimizer muon --schedule linear --precision bfloat16)
for variant in $VARIANTS; do
    $RUN train "${both[@]}" --out "$OUT/$variant-before" --model "$SIZE-$variant" --architecture rate_aware=true --lr 2e-3 \
        --steps "$((STEPS - ROUNDED))"
    $RUN train "${both[@]}" --out "$OUT/$variant" --model "$SIZE-$variant" --lr 1e-3 --steps "$ROUNDED" --rounded \
        --init "$OUT/$variant-before/weights.safetensors"
done
