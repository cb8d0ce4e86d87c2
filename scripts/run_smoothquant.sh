#!/usr/bin/env bash
# SmoothQuant's table by qllm's conventions: W8A8 and W6A6 with and without smoothing; perplexity and tasks.
# Usage: run_smoothquant.sh DEVICE MODEL_PATH      for example: run_smoothquant.sh 0 modelzoo/llama-2/llama-2-7b
#   DEVICE  cpu, a GPU index, several joined by commas, or all
# Environment: RECIPES="rtn-w4a4 smoothquant-w4a4" runs others, BESIDE=full adds full precision; ALPHA=0.8 smooths by it;
# STATIC=true fixes the activations' grids, one per tensor, on the calibration text; TASKS=boolq,mmlu with DATA, FEWSHOT,
# BATCH_SIZE; CORPUS, WINDOW, LIMIT and PROTOCOL (default gptq: plain windows, C4's old draw), MMLU_PROTOCOL (default
# lm-eval); CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEEDS; BEHIND=bos adds what is calibrated behind
# that prefix; OPTIONS, WORKERS, MAX_MEMORY: see common.sh.
# ALPHAS="0.35 0.5 0.65" HELD_OUT=NAME|FILE searches instead: perplexity of every alpha on that text, the best first.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -eq 2 ] || fail "usage: run_smoothquant.sh DEVICE MODEL_PATH (got $# of 2 arguments)"
[ -z "${ALPHAS:-}" ] || [ -n "${HELD_OUT:-}" ] ||
    fail "ALPHAS asks for a search, but HELD_OUT is not set; give a text that is not evaluated: HELD_OUT=NAME|FILE"
device=$1 model=$(model_path "$2")
words recipes RECIPES "rtn-w8a8-qllm smoothquant-w8a8-qllm rtn-w6a6-qllm smoothquant-w6a6-qllm"
enter_project
static=(${STATIC:+--set "activations.static=$STATIC"})

searched() { # RECIPE: a line for every alpha and arm
    local alpha arm prefix
    choose_text --recipe "$1" "${options[@]}"
    for alpha in $ALPHAS; do
        for arm in none bos ${behind:+behind}; do
            prefix=(--prefix "$arm")
            [ "$arm" != behind ] || prefix=(--prefix "$behind" --calibrate-behind-prefix)
            run_eval "$device" 29500 ppl --model "$model" --recipe "$1" --set "transforms.smooth.alpha=$alpha" "${prefix[@]}" \
                "${static[@]}" "${options[@]}" --protocol "$protocol" --corpus "$HELD_OUT" \
                ${WINDOW:+--window "$WINDOW"} ${LIMIT:+--limit "$LIMIT"} "${text[@]}" --json |
                python -c 'import json, sys; print("perplexity %.4f  alpha %s  %s  %s" %
                    (json.load(sys.stdin)["perplexity"], *sys.argv[1:]))' "$alpha" "$1" "${prefix[*]:1}"
        done
    done
}

measure_as qllm
if [ -n "${ALPHAS:-}" ]; then
    for recipe in "${recipes[@]}"; do
        case $recipe in smoothquant-*) searched "$recipe" | LC_ALL=C sort -k 6 -k 2,2g ;; esac
    done
    exit
fi
given=()
[ -z "${STATIC:-}" ] || given+=(--set "activations.static=$STATIC")
for recipe in "${recipes[@]}"; do
    case $recipe in smoothquant-*) [ -z "${ALPHA:-}" ] || given+=(--set "$recipe:transforms.smooth.alpha=$ALPHA") ;; esac
done
chosen=(--only RTN SmoothQuant)
[ -z "${RECIPES:-}" ] && [ "${#given[@]}" -eq 0 ] || chosen=(--recipe "${recipes[@]}" "${given[@]}")
reproduce "$device" "$model" smoothquant-accuracy "${chosen[@]}"
read -ra widths <<< "${BITS:-4}"
beside zeroquant-perplexity "${widths[@]/%/-bit}" # which has RTN and GPTQ per row
