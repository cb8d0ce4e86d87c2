#!/usr/bin/env bash
# KIVI's table of qllm: KV cache of 4 and 2 bits, groups of 32, the newest 128 tokens exact; vanilla and with [B].
# Usage: run_kivi.sh DEVICE MODEL_PATH      for example: run_kivi.sh 0 modelzoo/llama-2/llama-2-7b
#   DEVICE  cpu, a GPU index, several joined by commas, or all
# Environment: BITS="4 2", GROUP_SIZE=32 and RESIDUAL=128; PREFILL=exact|final|fp is what the tokens of one pass see of
# each other (default: final for perplexity and tasks that score, fp for tasks that generate, as the published figures
# were made; exact is what generation token by token sees); RECIPE="gptq-w4" puts it on those weights; BESIDE="full" adds
# the full-precision cache; TASKS=boolq,gsm8k with DATA, FEWSHOT, BATCH_SIZE; CORPUS, WINDOW, LIMIT and PROTOCOL (default
# gptq: plain windows, C4's old draw), MMLU_PROTOCOL (default lm-eval); OPTIONS, WORKERS, MAX_MEMORY: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
table_call "DEVICE MODEL_PATH" "$@"
OPTIONS="${RECIPE:+--recipe $RECIPE }${GROUP_SIZE:+--kv-group-size $GROUP_SIZE }${OPTIONS:-}"
rows KIVI "4 2"
reproduce kivi-perplexity "${only[@]}" ${RESIDUAL:+--set "kv_cache.residual=$RESIDUAL"} \
    ${PREFILL:+--set "kv_cache.prefill=$PREFILL"}
