#!/usr/bin/env bash
# PrefixQuant's figures: ranges of linears, outlier tokens, 3-D surfaces, each without a prefix and behind it.
# Usage: prefixquant.sh DEVICE MODEL_PATH      for example: prefixquant.sh 0 modelzoo/llama-2/llama-2-7b
#   DEVICE  cpu or a GPU index
# Environment: PREFIX (default bos; none for the text alone), CORPUS (default: the model's own calibration text, or pile),
# SAMPLES and TOKENS of the statistics (default: the model's own, or 64 × 1024), LAYERS of the surfaces (default step:8;
# step:1 draws all) and SURFACE_TOKENS (default 512), OUT is the directory (default outputs/figures).
# METHOD and BITS, GROUP_SIZE, KV_BITS draw a quantized model (default: fp16, 16, full precision), CALIBRATION,
# CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEED one that calibrates; OPTIONS: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 2 ] || fail "usage: prefixquant.sh DEVICE MODEL_PATH (got $# of 2 arguments)"
model=$(model_path "$2")
enter_project
device=$(device_option "$1")
choose_method "${METHOD:-fp16}" "${BITS:-16}" "$model" "${KV_BITS:-}"

plot() { # KIND, then its own options
    python -m eval plot "$1" --model "$model" --device "$device" "${method[@]}" --prefix "${PREFIX:-bos}" \
        ${CORPUS:+--corpus "$CORPUS"} ${OUT:+--out "$OUT"} "${@:2}"
}
for kind in linear-input linear-output outlier-layers outlier-count outlier-position outlier-content; do
    plot $kind ${SAMPLES:+--samples "$SAMPLES"} ${TOKENS:+--tokens "$TOKENS"}
done
for kind in layer-input-3d block-output-3d; do
    plot $kind ${SURFACE_TOKENS:+--tokens "$SURFACE_TOKENS"} ${LAYERS:+--layers "$LAYERS"}
done
