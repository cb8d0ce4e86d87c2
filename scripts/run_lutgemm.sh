#!/usr/bin/env bash
# LUT-GEMM's binary coding as in qllm's tables: 4 bits, one set of scales per row; perplexity and tasks, vanilla and [B].
# Usage: run_lutgemm.sh DEVICE MODEL_PATH [ROUNDS]      for example: run_lutgemm.sh 0 modelzoo/llama-2/llama-2-7b 30
#   DEVICE  cpu, a GPU index, several joined by commas, or all
#   ROUNDS  0 greedy, 1 refined greedy, 2 and more alternating (default 30, as in the tables)
# Environment: BITS="4 3" and GROUP_SIZE=128 make the other published rows, BESIDE="full rtn gptq" what stands beside
# them; TASKS=boolq,mmlu with DATA, FEWSHOT, BATCH_SIZE; CORPUS, WINDOW, LIMIT and PROTOCOL (default gptq: plain windows,
# C4's old draw), MMLU_PROTOCOL (default lm-eval); OPTIONS, MAX_MEMORY: see common.sh. BCQ looks at no calibration text.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -eq 2 ] || [ $# -eq 3 ] || fail "usage: run_lutgemm.sh DEVICE MODEL_PATH [ROUNDS] (got $# of 2 or 3 arguments)"
device=$1 model=$(model_path "$2") rounds=${3:-30}
[[ $rounds =~ ^[0-9]+$ ]] || fail "ROUNDS '$rounds' is no number; give 0, 1, … or the published 30"
enter_project
measure_as qllm
echo "ROUNDS $rounds (0 greedy, 1 refined, 2 and more alternating), BITS ${BITS:-4}" >&2
for bits in ${BITS:-4}; do
    row --recipe bcq-row --bits "$bits" --group-size "${GROUP_SIZE:--1}" --set "weights.rounds=$rounds"
    rows_beside "$bits" "${GROUP_SIZE:--1}"
done
show_rows
