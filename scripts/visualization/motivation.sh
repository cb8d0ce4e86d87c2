#!/usr/bin/env bash
# IntactKV's motivation: loss of the 3-bit model against the number of prefix tokens kept intact.
# Usage: motivation.sh MODEL SIZE DEVICE      for example: motivation.sh llama-2 7b 0
#   DEVICE  cpu or a GPU index
# Environment: METHOD and BITS (default: rtn, 3), GROUP_SIZE, KV_BITS of the quantized model (default: 16, full precision),
# CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEED of methods that calibrate; PREFIX (default: what every
# conversation starts with), SAMPLES, TOKENS of the conversations, OUT; OPTIONS: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 3 ] || fail "usage: motivation.sh MODEL SIZE DEVICE (got $# of 3 arguments)"
enter_project
device=$(device_option "$3")
model=$(model_directory "$1" "$2")
choose_method "${METHOD:-rtn}" "${BITS:-3}" "$model" "${KV_BITS:-}"
python -m eval plot motivation --model "$model" --device "$device" "${method[@]}" \
    ${PREFIX:+--prefix "$PREFIX"} ${SAMPLES:+--samples "$SAMPLES"} ${TOKENS:+--tokens "$TOKENS"} ${OUT:+--out "$OUT"}
