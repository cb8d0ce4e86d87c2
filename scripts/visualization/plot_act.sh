#!/usr/bin/env bash
# IntactKV's figures of a full-precision model: activation surfaces, attention maps, smoothness of keys and values.
# Usage: plot_act.sh MODEL SIZE DEVICE      for example: plot_act.sh llama-2 7b 0
#   DEVICE  cpu or a GPU index
# Environment: CORPUS is the text (default: a ShareGPT conversation; for smollm2 its sample), LAYERS the blocks to draw
# (default step:8), PREFIX=bos adds the same text behind that prefix, OUT is the directory (default outputs/figures).
# METHOD and BITS, GROUP_SIZE, KV_BITS draw a quantized model (default: fp16, 16, full precision), CALIBRATION,
# CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEED one that calibrates; OPTIONS: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 3 ] || fail "usage: plot_act.sh MODEL SIZE DEVICE (got $# of 3 arguments)"
enter_project
device=$(device_option "$3")
model=$(model_directory "$1" "$2")
choose_method "${METHOD:-fp16}" "${BITS:-16}" "$model" "${KV_BITS:-}"

plot() { # KIND, then its own options
    python -m eval plot "$1" --model "$model" --device "$device" "${method[@]}" ${CORPUS:+--corpus "$CORPUS"} \
        ${OUT:+--out "$OUT"} "${@:2}"
}
for kind in act attn; do
    plot $kind ${LAYERS:+--layers "$LAYERS"} ${PREFIX:+--prefix "$PREFIX"}
done
plot kv-smooth
