#!/usr/bin/env bash
# ZeroQuant's table: W8A8, W4/8A16, W4/8A8, W4A4, and distilled W4/8A16 and W4A4; perplexity and tasks, vanilla and [B].
# Usage: run_zeroquant.sh DEVICE MODEL_PATH
#        for example: run_zeroquant.sh 0 modelzoo/llama-3.1-instruct/llama-3.1-instruct-8b
#   DEVICE  cpu, a GPU index, several joined by commas, or all
# Environment: RUNS, into how many every matrix is cut (default: 4096 on llama-3.1-instruct-8b, as published; else 0, one
# per row); BESIDE="full rtn gptq", the latter two W4A16; TASKS=boolq,mmlu with DATA, FEWSHOT, BATCH_SIZE; CORPUS, WINDOW,
# LIMIT and PROTOCOL (default gptq: plain windows, C4's old draw), MMLU_PROTOCOL (default lm-eval); OPTIONS, WORKERS,
# MAX_MEMORY: see common.sh. Of the distillation, by default the seven published rows (100 to 600 steps of the last block):
# BLOCKS=all|last, STEPS, LR run the two recipes with these instead, on every model uncut unless RUNS is given;
# CALIBRATION (default: wikitext2 for the published rows, c4 for the recipes; smollm2 has its own sample),
# CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEEDS; BEHIND=bos adds the weights distilled behind that prefix.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
table_call "DEVICE MODEL_PATH" "$@"
beside=${BESIDE:-}
reproduce zeroquant-perplexity --only ZeroQuant ${beside/full/fp16} ${RUNS:+--set "zeroquant:weights.groups=$RUNS"}
if [ -z "${BLOCKS:-}${STEPS:-}${LR:-}" ]; then
    reproduce zeroquant-distillation --only LKD ${RUNS:+--set "lkd:weights.groups=$RUNS"}
else
    reproduce zeroquant-distillation --recipe zeroquant-w4-8a16-lkd zeroquant-w4a4-lkd \
        --set "tuning.blocks=${BLOCKS:-last}" ${STEPS:+--set "tuning.steps=$STEPS"} ${LR:+--set "tuning.lr=$LR"} \
        ${RUNS:+--set "weights.groups=$RUNS"}
fi
