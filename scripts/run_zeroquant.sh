#!/usr/bin/env bash
# ZeroQuant's table: W8A8, W4/8A16, W4/8A8, W4A4, and distilled W4/8A16 and W4A4; perplexity vanilla and with [B].
# Usage: run_zeroquant.sh DEVICE MODEL_PATH
#        for example: run_zeroquant.sh 0 modelzoo/llama-3.1-instruct/llama-3.1-instruct-8b
# Environment: CORPUS, WINDOW, LIMIT override the model's defaults; RUNS=4096 cuts matrices as the published code does.
# Of the distillation: BLOCKS=all trains every block (default: the last, as published); STEPS, LR; CALIBRATION,
# CALIBRATION_SAMPLES, CALIBRATION_LENGTH; BEHIND=bos adds the weights that are distilled behind that prefix.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -eq 2 ] || fail "usage: run_zeroquant.sh DEVICE MODEL_PATH (got $# of 2 arguments)"
model=$(realpath "$2")
enter_project
common=(
    ${RUNS:+--set "weights.groups=$RUNS"} ${CORPUS:+--corpus "$CORPUS"} ${WINDOW:+--window "$WINDOW"}
)
distilled=(--set "tuning.blocks=${BLOCKS:-last}" ${STEPS:+--set "tuning.steps=$STEPS"} ${LR:+--set "tuning.lr=$LR"})
text=("${calibration[@]}") behind=${BEHIND:-}
calibration=() BEHIND='' # rounding alone looks at no text
for recipe in zeroquant-w8a8 zeroquant-w4-8a16 zeroquant-w4-8a8 zeroquant-w4a4; do
    arms ppl "$1" 29500 "$model" --recipe "$recipe" "${common[@]}" > /dev/null
done
calibration=("${text[@]}") BEHIND=$behind
for recipe in zeroquant-w4-8a16-lkd zeroquant-w4a4-lkd; do
    arms ppl "$1" 29500 "$model" --recipe "$recipe" "${common[@]}" "${distilled[@]}" > /dev/null
done
python -m eval table --model "$(basename "$model")" --costs
