#!/usr/bin/env bash
# GPTQ as in qllm's tables: 4 bits, one grid per row, act-order, seed 0; perplexity and tasks, vanilla and with [B].
# Usage: run_gptq.sh DEVICE MODEL_PATH      for example: run_gptq.sh 0 modelzoo/llama-2/llama-2-7b
#   DEVICE  cpu, a GPU index, several joined by commas, or all
# Environment: BITS="4 3", ACT_ORDER="true false" (OPT was published with false) and GROUP_SIZE=128 make the other
# published rows, BESIDE="full rtn" full precision and RTN beside them; TASKS=boolq,mmlu with DATA, FEWSHOT, BATCH_SIZE;
# CORPUS, WINDOW, LIMIT and PROTOCOL (default gptq: plain windows, C4's old draw), MMLU_PROTOCOL (default lm-eval);
# CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEED; BEHIND=bos adds the weights that are calibrated behind that
# prefix; OPTIONS, MAX_MEMORY: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -eq 2 ] || fail "usage: run_gptq.sh DEVICE MODEL_PATH (got $# of 2 arguments)"
device=$1 model=$(model_path "$2")
enter_project
measure_as qllm
for bits in ${BITS:-4}; do
    for order in ${ACT_ORDER:-true}; do
        gptq_row "$bits" "${GROUP_SIZE:--1}" --set "weights.act_order=$order"
    done
    rows_beside "$bits" "${GROUP_SIZE:--1}"
done
show_rows
