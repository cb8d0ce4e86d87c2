#!/usr/bin/env bash
# Table 1 of IntactKV: perplexity in full precision and of 3-bit weights, alone and with IntactKV_[B], beside the
# published figures.
# Usage: table1.sh DEVICE MODEL_PATH [METHOD]…      for example: table1.sh 0 modelzoo/llama-2/llama-2-7b gptq awq
#   METHOD  rtn, gptq, omniquant, awq (default: all)
# Environment: CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEED of the text to calibrate on; EPOCHS of
# OmniQuant; CORPUS, WINDOW, LIMIT what is scored.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 2 ] || fail "usage: table1.sh DEVICE MODEL_PATH [METHOD]… (got $# of at least 2 arguments)"
device=$1 model=$(realpath -m "$2")
shift 2
enter_project
text=("${calibration[@]}" ${SEED:+--seed "$SEED"})

[ $# -gt 0 ] || set -- rtn gptq omniquant awq
for method in "$@"; do
    [[ " rtn gptq omniquant awq " = *" $method "* ]] ||
        fail "method '$method' is not in the table; choose from rtn, gptq, omniquant, awq"
done

BEHIND='' # the paper's tables have no such arm
for method in fp16 "$@"; do
    recipe=(--recipe "$method") calibration=()
    [ "$method" = fp16 ] || recipe+=(--bits 3)
    case $method in
        gptq | awq) calibration=("${text[@]}") ;;
        omniquant) calibration=("${text[@]}" ${EPOCHS:+--set "weights.epochs=$EPOCHS"}) ;;
    esac
    arms ppl "$device" 29500 "$model" "${recipe[@]}" \
        ${CORPUS:+--corpus "$CORPUS"} ${WINDOW:+--window "$WINDOW"} > /dev/null
done
python -m eval table 1 --model "$(basename "$model")"
