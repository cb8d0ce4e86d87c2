#!/usr/bin/env bash
# SmoothQuant's table by qllm's conventions: W8A8 and W6A6 with and without smoothing; perplexity vanilla and with [B].
# Usage: run_smoothquant.sh DEVICE MODEL_PATH      for example: run_smoothquant.sh 0 modelzoo/llama-2/llama-2-7b
# Environment: CORPUS, WINDOW, LIMIT, CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH override the model's defaults;
# BEHIND=bos adds what is calibrated behind that prefix; RECIPES="rtn-w4a4 smoothquant-w4a4" runs others; ALPHA=0.8
# smooths by it; STATIC=true fixes the activations' grids, one per tensor, on the calibration text.
# ALPHAS="0.35 0.5 0.65" HELD_OUT=NAME|FILE searches instead: perplexity of every alpha on that text, the best first.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -eq 2 ] || fail "usage: run_smoothquant.sh DEVICE MODEL_PATH (got $# of 2 arguments)"
[ -z "${ALPHAS:-}" ] || [ -n "${HELD_OUT:-}" ] ||
    fail "ALPHAS asks for a search, but HELD_OUT is not set; give a text that is not evaluated: HELD_OUT=NAME|FILE"
device=$1 model=$(realpath "$2") behind=${BEHIND:-} text=("${calibration[@]}")
read -ra recipes <<< "${RECIPES:-rtn-w8a8-qllm smoothquant-w8a8-qllm rtn-w6a6-qllm smoothquant-w6a6-qllm}"
enter_project

searched() { # RECIPE: a line for every alpha and arm
    local alpha prefix
    for alpha in $ALPHAS; do
        for prefix in "--prefix none" "--prefix bos" ${behind:+"--prefix $behind --calibrate-behind-prefix"}; do
            # shellcheck disable=SC2086 # a prefix is several words
            run_eval "$device" 29500 ppl --model "$model" --recipe "$1" --set "transforms.smooth.alpha=$alpha" $prefix \
                ${STATIC:+--set "activations.static=$STATIC"} --corpus "$HELD_OUT" ${WINDOW:+--window "$WINDOW"} \
                ${LIMIT:+--limit "$LIMIT"} "${text[@]}" --json |
                python -c 'import json, sys; print("perplexity %.4f  alpha %s  %s  %s" %
                    (json.load(sys.stdin)["perplexity"], *sys.argv[1:]))' "$alpha" "$1" "${prefix#--prefix }"
        done
    done
}

for recipe in "${recipes[@]}"; do
    options=(--recipe "$recipe" ${STATIC:+--set "activations.static=$STATIC"}) calibration=() BEHIND=
    case $recipe in smoothquant-*) options+=(${ALPHA:+--set "transforms.smooth.alpha=$ALPHA"}) ;; esac
    if [[ $recipe = smoothquant-* || ${STATIC:-} = true ]]; then calibration=("${text[@]}") BEHIND=$behind; fi
    if [ -z "${ALPHAS:-}" ]; then
        arms ppl "$device" 29500 "$model" "${options[@]}" ${CORPUS:+--corpus "$CORPUS"} ${WINDOW:+--window "$WINDOW"}
    elif [[ $recipe = smoothquant-* ]]; then
        searched "$recipe" | LC_ALL=C sort -k 6 -k 2,2g
    fi
done
[ -n "${ALPHAS:-}" ] || python -m eval table --model "$(basename "$model")" --costs # all finished runs, to compare
