#!/usr/bin/env bash
# LUT-GEMM's table of qllm: binary coding of 4 bits, one set of scales per row; perplexity and tasks, vanilla and [B].
# Usage: run_lutgemm.sh DEVICE MODEL_PATH [ROUNDS]      for example: run_lutgemm.sh 0 modelzoo/llama-2/llama-2-7b 30
#   DEVICE  cpu, a GPU index, several joined by commas, or all
#   ROUNDS  0 greedy, 1 refined greedy, 2 and more alternating (default 30, as in the tables)
# Environment: BITS="4 3" and GROUP_SIZE=128 make the other published rows, BESIDE="full rtn gptq" what stands beside
# them; TASKS=boolq,mmlu with DATA, FEWSHOT, BATCH_SIZE; CORPUS, WINDOW, LIMIT and PROTOCOL (default gptq: plain windows,
# C4's old draw), MMLU_PROTOCOL (default lm-eval); OPTIONS, WORKERS, MAX_MEMORY: see common.sh. BCQ looks at no
# calibration text.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
table_call "DEVICE MODEL_PATH [ROUNDS]" "$@"
[[ ${3:-30} =~ ^[0-9]+$ ]] || fail "ROUNDS '$3' is no number; give 0, 1, … or the published 30"
grid=", rows"
[ "${GROUP_SIZE:--1}" = -1 ] || grid=", groups" OPTIONS="--group-size $GROUP_SIZE ${OPTIONS:-}"
rows LUT-GEMM 4 "$grid"
reproduce lutgemm-perplexity "${only[@]}" ${3:+--set "LUT-GEMM:weights.rounds=$3"}
