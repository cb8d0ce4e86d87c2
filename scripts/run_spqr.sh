#!/usr/bin/env bash
# SpQR's table of qllm: 3-bit codes, two-level grids, outliers kept, 3.99 bits in all; perplexity and tasks.
# Usage: run_spqr.sh DEVICE MODEL_PATH      for example: run_spqr.sh 0 modelzoo/llama-2/llama-2-7b
#   DEVICE  cpu, a GPU index, several joined by commas, or all
# Environment: RECIPES="spqr spqr-w2" adds the published 3.07 bits (others: reproduce spqr-perplexity --recipe NAME),
# BESIDE="full rtn gptq" what stands beside them, at BITS="4 3" per row; TASKS=winogrande,piqa with DATA, FEWSHOT, BATCH_SIZE; CORPUS,
# WINDOW, LIMIT and PROTOCOL (default gptq: plain windows, C4's old draw), MMLU_PROTOCOL (default lm-eval);
# CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEEDS; BEHIND=bos adds the weights that are calibrated behind
# that prefix; OPTIONS, WORKERS, MAX_MEMORY: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
table_call "DEVICE MODEL_PATH" "$@"
words own RECIPES spqr
rows "" 4
reproduce spqr-perplexity "${only[@]}" "${own[@]/%spqr/SpQR, 3.99 bits}" # the recipe's name is also the method's
