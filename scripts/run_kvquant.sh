#!/usr/bin/env bash
# KVQuant as in qllm's tables: KV cache of 4, 3 and 2 bits, 1 % of outliers, first token exact; vanilla and with [B].
# Usage: run_kvquant.sh DEVICE MODEL_PATH      for example: run_kvquant.sh 0 modelzoo/llama-2/llama-2-7b
#   DEVICE  cpu, a GPU index, several joined by commas, or all
# Environment: BITS="4 3 2", OUTLIERS=0.01 (0: none), SINKS=1, LEVELS=nuq|uniform|nf, QNORM=0|1 (published at 2 bits for
# DBRX) and WEIGHTING=fisher|fisher_range|none, which is how the text weighs when levels are fitted (all but none hold the
# whole model for a pass with gradients); RECIPE="gptq-w4" puts it on those weights; BESIDE="full" adds the
# full-precision cache; BEHIND=bos adds levels that are calibrated behind that prefix; TASKS=boolq,gsm8k with DATA,
# FEWSHOT, BATCH_SIZE; CORPUS, WINDOW, LIMIT and PROTOCOL (default gptq: plain windows, C4's old draw), MMLU_PROTOCOL
# (default lm-eval); CALIBRATION=wikitext2, CALIBRATION_SAMPLES=16, CALIBRATION_LENGTH=2048, SEED=0 (as published; the
# embedded model needs CALIBRATION=sample); OPTIONS, MAX_MEMORY: see common.sh.
set -euo pipefail
: "${CALIBRATION:=wikitext2}" "${CALIBRATION_SAMPLES:=16}" "${CALIBRATION_LENGTH:=2048}" "${SEED:=0}"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -eq 2 ] || fail "usage: run_kvquant.sh DEVICE MODEL_PATH (got $# of 2 arguments)"
device=$1 model=$(model_path "$2")
enter_project
measure_as qllm
qnorm=false
! flag QNORM 0 || qnorm=true
for bits in ${BITS:-4 3 2}; do
    row --recipe "${RECIPE:-fp16}" --kv kvquant --kv-bits "$bits" --set "kv_cache.outliers=${OUTLIERS:-0.01}" \
        --set "kv_cache.sinks=${SINKS:-1}" --set "kv_cache.levels=${LEVELS:-nuq}" --set "kv_cache.qnorm=$qnorm" \
        --set "kv_cache.weighting=${WEIGHTING:-fisher}"
done
rows_beside 4 -1
show_rows
