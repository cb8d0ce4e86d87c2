#!/usr/bin/env bash
# The weight-only table: every method at 4 and 3 bits in groups and at 4 bits per row, vanilla, with [B], and calibrated
# behind [B]; perplexity, and what quantizing took.
# Usage: weights.sh DEVICE MODEL_PATH [METHOD]…      for example: weights.sh 0 modelzoo/llama-2/llama-2-7b gptq awq
#   METHOD  rtn, gptq, awq, omniquant, spqr, bcq (default: all)
# Environment: EPOCHS of OmniQuant (default: the recipe's), and what eval.sh takes: CORPUS, WINDOW, LIMIT, PROTOCOL,
# CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEED; OPTIONS, MAX_MEMORY: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 2 ] || fail "usage: weights.sh DEVICE MODEL_PATH [METHOD]… (got $# of at least 2 arguments)"
device=$1 model=$(model_path "$2")
shift 2
enter_project

[ $# -gt 0 ] || set -- rtn gptq awq omniquant spqr bcq
for method in "$@"; do
    [[ " rtn gptq awq omniquant spqr bcq " = *" $method "* ]] ||
        fail "method '$method' is not in the table; choose from rtn, gptq, awq, omniquant, spqr, bcq"
done
measure_as intactkv
BEHIND=bos
for method in "$@"; do
    grids=("--bits 4" "--bits 3" "--bits 4 --group-size -1") recipes=("$method") settings=()
    case $method in
        omniquant) settings=(${EPOCHS:+--set "weights.epochs=$EPOCHS"}) ;;
        spqr) recipes=(spqr spqr-w2) grids=("") ;; # groups of its own: four and three bits a weight in all
    esac
    for recipe in "${recipes[@]}"; do
        for grid in "${grids[@]}"; do
            # shellcheck disable=SC2086 # a grid is several words
            row --recipe "$recipe" $grid "${settings[@]}"
        done
    done
done
show_rows
