#!/usr/bin/env bash
# IntactKV's motivation: loss of the 3-bit model against the number of prefix tokens kept intact.
# Usage: motivation.sh MODEL SIZE DEVICE      for example: motivation.sh llama-2 7b 0
#   DEVICE  cpu or a GPU index
# Environment: METHOD and BITS (default: rtn, 3), PREFIX (default: prompt), SAMPLES, TOKENS of the conversations, OUT.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 3 ] || fail "usage: motivation.sh MODEL SIZE DEVICE (got $# of 3 arguments)"
enter_project
device=$(device_option "$3")
python -m eval plot motivation --model "$(model_directory "$1" "$2")" --device "$device" --recipe "${METHOD:-rtn}" \
    --bits "${BITS:-3}" --prefix "${PREFIX:-prompt}" ${SAMPLES:+--samples "$SAMPLES"} ${TOKENS:+--tokens "$TOKENS"} \
    ${OUT:+--out "$OUT"}
