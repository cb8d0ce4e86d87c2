#!/usr/bin/env bash
# SmoothQuant's table by qllm's conventions: W8A8 and W6A6 with and without smoothing; perplexity and tasks.
# Usage: run_smoothquant.sh DEVICE MODEL_PATH      for example: run_smoothquant.sh 0 modelzoo/llama-2/llama-2-7b
#   DEVICE  cpu, a GPU index, several joined by commas, or all
# Environment: RECIPES="rtn-w4a4 smoothquant-w4a4" runs others, BESIDE=full adds full precision; ALPHA=0.8 smooths by it;
# STATIC=true fixes the activations' grids, one per tensor, on the calibration text; TASKS=boolq,mmlu with DATA, FEWSHOT,
# BATCH_SIZE; CORPUS, WINDOW, LIMIT and PROTOCOL (default gptq: plain windows, C4's old draw), MMLU_PROTOCOL (default
# lm-eval); CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEEDS; BEHIND=bos adds what is calibrated behind
# that prefix; OPTIONS, WORKERS, MAX_MEMORY: see common.sh.
# ALPHAS="0.35 0.5 0.65" HELD_OUT=NAME|FILE searches instead: W8A8 with these of the published alphas (0.35 to 0.90 in
# steps of 0.05), scored on that text.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
table_call "DEVICE MODEL_PATH" "$@"
beside=${BESIDE:-}
if [ -n "${ALPHAS:-}" ]; then
    [ -n "${HELD_OUT:-}" ] || fail "ALPHAS asks for a search, but HELD_OUT is not set; give a text that is not evaluated"
    for alpha in $ALPHAS; do
        [[ $alpha != ?.? ]] || alpha+=0 # as the table's rows are called
        only+=("alpha $alpha")
    done
    CORPUS=$HELD_OUT reproduce smoothquant-alpha --only "${only[@]}"
    exit
fi
TASKS=${TASKS:-none}
if [ -z "${RECIPES:-}${STATIC:-}" ]; then
    reproduce smoothquant-accuracy --only rtn smoothquant ${beside/full/fp16} \
        ${ALPHA:+--set "smoothquant:transforms.smooth.alpha=$ALPHA"}
else
    words recipes RECIPES "rtn-w8a8-qllm smoothquant-w8a8-qllm rtn-w6a6-qllm smoothquant-w6a6-qllm"
    for recipe in "${recipes[@]}"; do
        [[ $recipe != smoothquant-* ]] || smooth+=(${ALPHA:+--set "$recipe:transforms.smooth.alpha=$ALPHA"})
    done
    reproduce smoothquant-accuracy --recipe ${BESIDE:+fp16} "${recipes[@]}" "${smooth[@]}" ${STATIC:+--set "activations.static=$STATIC"}
fi
