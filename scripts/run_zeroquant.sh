#!/usr/bin/env bash
# ZeroQuant's table: W8A8, W4/8A16, W4/8A8, W4A4, and distilled W4/8A16 and W4A4; perplexity and tasks, vanilla and [B].
# Usage: run_zeroquant.sh DEVICE MODEL_PATH
#        for example: run_zeroquant.sh 0 modelzoo/llama-3.1-instruct/llama-3.1-instruct-8b
#   DEVICE  cpu, a GPU index, several joined by commas, or all
# Environment: RUNS, into how many every matrix is cut (default: 4096 on llama-3.1-8b-instruct, as published; else 0, one
# per row); BESIDE="full rtn gptq" at BITS=4; TASKS=boolq,mmlu with DATA, FEWSHOT, BATCH_SIZE; CORPUS, WINDOW, LIMIT and
# PROTOCOL (default gptq: plain windows, C4's old draw), MMLU_PROTOCOL (default lm-eval); OPTIONS, WORKERS,
# MAX_MEMORY: see common.sh. Of the distillation: BLOCKS=all trains every block (default: the last, as published); STEPS, LR;
# CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEEDS; BEHIND=bos adds the weights distilled behind that prefix.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -eq 2 ] || fail "usage: run_zeroquant.sh DEVICE MODEL_PATH (got $# of 2 arguments)"
device=$1 model=$(model_path "$2")
enter_project
name=$(basename "${model,,}") runs=0
[[ $name != *llama-3.1-8b-instruct* && $name != *llama-3.1-instruct-8b* ]] || runs=4096
runs=${RUNS:-$runs}
case $runs in
    0) echo "cut: one grid per row (RUNS=4096 is the published one)" >&2 ;;
    *) echo "cut: $runs runs of every matrix" >&2 ;;
esac
cut=(--set "weights.groups=$runs")
reproduce "$device" "$model" zeroquant-perplexity --only ZeroQuant ${RUNS:+"${cut[@]}"}
reproduce "$device" "$model" zeroquant-distillation --recipe zeroquant-w4-8a16-lkd zeroquant-w4a4-lkd "${cut[@]}" \
    --set "tuning.blocks=${BLOCKS:-last}" ${STEPS:+--set "tuning.steps=$STEPS"} ${LR:+--set "tuning.lr=$LR"}
read -ra widths <<< "${BITS:-4}"
beside zeroquant-perplexity "${widths[@]/%/-bit}"
