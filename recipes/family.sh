#!/usr/bin/env bash
# Entropy models that differ in nothing else: behind the same frozen transforms, on the same latents in the same order,
# told the rate, and trained for the rate of rounded latents, which is what files hold (docs/training.md). Over the last
# third of the steps crops are larger.
#
#   DATA=photos bash recipes/family.sh
#
# Needs: a model whose transforms are taken (TRANSFORMS), pictures with at least 320 pixels on both sides (LAST_CROP),
# and 2.5 MB of disk a picture (8 crops of 320 pixels, 384 channels).
# Time: one to two hours a variant at size tiny on one CPU core, three for GroupedMixer.
# Memory: 1.4 GB on a CPU, measured at size tiny with GroupedMixer, which takes most.
# HELD_OUT=list.txt names pictures that are left out; their rate is in each log.
# Result: OUT/VARIANT/weights.safetensors. All decode the same pictures, so their rates can be divided.
set -euo pipefail

RUN=${RUN:-entroformer}
DATA=${DATA:?set DATA to the pictures}
OUT=${OUT:-runs/family}
SIZE=${SIZE:-tiny}
TRANSFORMS=${TRANSFORMS:-blocks-parallel}
VARIANTS=${VARIANTS:-serial parallel groupedmixer cnn minnen hyperprior hyperprior-cnn context context-cnn}
CROP=${CROP:-256}
LAST_CROP=${LAST_CROP:-320}

python -m entroformer_lib.training.latents --transforms "$TRANSFORMS" --data "$DATA" --out "$OUT/latents" \
    --crop "$LAST_CROP" ${HELD_OUT:+--held-out "$HELD_OUT"}
for variant in $VARIANTS; do
    $RUN train --data "$DATA" --out "$OUT/$variant" --model "$SIZE-$variant" --architecture rate_aware=true \
        --transforms "$TRANSFORMS" --latents "$OUT/latents" --rounded --steps "${STEPS:-8000}" --batch "${BATCH:-8}" \
        --crop "$CROP" --last-crop "$LAST_CROP" --last-share 0.333 \
        --optimizer muon --lr 2e-3 --schedule linear --precision auto
done
