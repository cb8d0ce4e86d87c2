#!/usr/bin/env bash
# KIVI as in qllm's tables: KV cache of 4 and 2 bits, groups of 32, the newest 128 tokens exact; vanilla and with [B].
# Usage: run_kivi.sh DEVICE MODEL_PATH      for example: run_kivi.sh 0 modelzoo/llama-2/llama-2-7b
#   DEVICE  cpu, a GPU index, several joined by commas, or all
# Environment: BITS="4 2", GROUP_SIZE=32 and RESIDUAL=128; PREFILL=exact|final|fp is what the tokens of one pass see of
# each other (default: final for perplexity and tasks that score, fp for tasks that generate, as the published figures
# were made; exact is what generation token by token sees); RECIPE="gptq-w4" puts it on those weights; BESIDE="full" adds
# the full-precision cache; TASKS=boolq,gsm8k with DATA, FEWSHOT, BATCH_SIZE; CORPUS, WINDOW, LIMIT and PROTOCOL (default
# gptq: plain windows, C4's old draw), MMLU_PROTOCOL (default lm-eval); OPTIONS, MAX_MEMORY: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -eq 2 ] || fail "usage: run_kivi.sh DEVICE MODEL_PATH (got $# of 2 arguments)"
device=$1 model=$(model_path "$2")
enter_project
measure_as qllm
for bits in ${BITS:-4 2}; do
    kivi_row "$bits" --recipe "${RECIPE:-fp16}"
done
rows_beside 4 -1
show_rows
