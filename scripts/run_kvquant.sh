#!/usr/bin/env bash
# KVQuant's table of qllm: KV cache of 4, 3 and 2 bits, 1 % of outliers, first token exact; vanilla and with [B].
# Usage: run_kvquant.sh DEVICE MODEL_PATH      for example: run_kvquant.sh 0 modelzoo/llama-2/llama-2-7b
#   DEVICE  cpu, a GPU index, several joined by commas, or all
# Environment: BITS="4 3 2", OUTLIERS=0.01 (0: none), SINKS=1, LEVELS=nuq|uniform|nf, QNORM=0|1 (published at 2 bits for
# DBRX) and WEIGHTING=fisher|fisher_range|none, which is how the text weighs when levels are fitted (all but none hold the
# whole model for a pass with gradients); RECIPE="gptq-w4" puts it on those weights; BESIDE="full" adds the
# full-precision cache; BEHIND=bos adds levels that are calibrated behind that prefix; TASKS=boolq,gsm8k with DATA,
# FEWSHOT, BATCH_SIZE; CORPUS, WINDOW, LIMIT and PROTOCOL (default gptq: plain windows, C4's old draw), MMLU_PROTOCOL
# (default lm-eval); CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEEDS (published: wikitext2, 16, 2048, 0; the
# embedded model has a text of its own); OPTIONS, WORKERS, MAX_MEMORY: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
table_call "DEVICE MODEL_PATH" "$@"
OPTIONS="${RECIPE:+--recipe $RECIPE }${OPTIONS:-}"
! flag QNORM 0 || OPTIONS="--set kv_cache.qnorm=true $OPTIONS"
rows KVQuant "4 3 2"
reproduce kvquant-perplexity "${only[@]}" ${OUTLIERS:+--set "kv_cache.outliers=$OUTLIERS"} \
    ${SINKS:+--set "kv_cache.sinks=$SINKS"} ${LEVELS:+--set "kv_cache.levels=$LEVELS"} \
    ${WEIGHTING:+--set "kv_cache.weighting=$WEIGHTING"}
