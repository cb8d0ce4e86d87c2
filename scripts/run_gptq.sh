#!/usr/bin/env bash
# GPTQ's table of qllm: weights of one grid per row, act-order, seed 0; perplexity and tasks, vanilla and with [B].
# Usage: run_gptq.sh DEVICE MODEL_PATH      for example: run_gptq.sh 0 modelzoo/llama-2/llama-2-7b
#   DEVICE  cpu, a GPU index, several joined by commas, or all
# Environment: BITS="4 3" (default 4), ACT_ORDER="true false" (default true; OPT was published with false),
# GROUP_SIZE=128 (default -1, a row), BESIDE="full rtn" full precision and RTN beside them; TASKS=boolq,mmlu with DATA,
# FEWSHOT, BATCH_SIZE; CORPUS, WINDOW, LIMIT and PROTOCOL (default gptq: plain windows, C4's old draw), MMLU_PROTOCOL
# (default lm-eval); CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEEDS; BEHIND=bos adds the weights that are
# calibrated behind that prefix; OPTIONS, WORKERS, MAX_MEMORY: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
table_call "DEVICE MODEL_PATH" "$@"
orders=" ${ACT_ORDER:-true} " plain=gptq-llama-no-act-order
[[ " true false true " = *"$orders"* ]] || fail "ACT_ORDER='$ACT_ORDER' is not allowed; give true, false or both"
[[ $(basename "$model") != opt-* ]] || plain=gptq-opt
tables=${orders/true/gptq-llama}
[ "${GROUP_SIZE:--1}" = -1 ] || OPTIONS="--group-size $GROUP_SIZE --set gptq:weights.static_groups=false ${OPTIONS:-}"
rows GPTQ 4
reproduce ${tables/false/$plain} "${only[@]}"
