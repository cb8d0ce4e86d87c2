#!/usr/bin/env bash
# What a method does inside a model, without and with [BOS] intact: errors over depth, pivot tokens, the KV cache at 4 bits.
# Usage: stats.sh MODEL SIZE METHOD BITS DEVICE      for example: stats.sh llama-2 7b rtn 3 0
#   METHOD  a recipe that quantizes weights: rtn, gptq, awq, omniquant, spqr, bcq, …          BITS  of the weights
#   DEVICE  cpu or a GPU index
# Environment: CORPUS, GROUP_SIZE, WINDOW, PROTOCOL (default intactkv), LIMIT windows, and of methods that calibrate
# CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEED override the model's defaults; KV_BITS the 4 bits of the
# cache; OPTIONS of the method: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 5 ] || fail "usage: stats.sh MODEL SIZE METHOD BITS DEVICE (got $# of 5 arguments)"
enter_project
device=$(device_option "$5")
model=$(model_directory "$1" "$2")
choose_method "$3" "$4" "$model"
common=(
    --model "$model" --device "$device" --protocol "${PROTOCOL:-intactkv}" ${CORPUS:+--corpus "$CORPUS"}
    ${WINDOW:+--window "$WINDOW"} ${LIMIT:+--limit "$LIMIT"}
)

python -m eval stats pivots "${common[@]}"
python -m eval stats linears "${common[@]}" "${method[@]}"
python -m eval stats linears "${common[@]}" "${method[@]}" --prefix bos
python -m eval stats distance "${common[@]}" "${method[@]}" --prefix bos
python -m eval stats kv "${common[@]}" --kv-bits "${KV_BITS:-4}" --prefix bos
