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
[ $# -eq 2 ] || [ $# -eq 3 ] || fail "usage: run_lutgemm.sh DEVICE MODEL_PATH [ROUNDS] (got $# of 2 or 3 arguments)"
device=$1 model=$(model_path "$2") rounds=${3:-30}
[[ $rounds =~ ^[0-9]+$ ]] || fail "ROUNDS '$rounds' is no number; give 0, 1, … or the published 30"
enter_project
grid=rows
[ "${GROUP_SIZE:--1}" = -1 ] || grid=groups OPTIONS="--group-size $GROUP_SIZE ${OPTIONS:-}"
[ "$rounds" = 30 ] || OPTIONS="--set weights.rounds=$rounds ${OPTIONS:-}"
own=() others=()
for bits in ${BITS:-4}; do
    own+=("LUT-GEMM, $bits bits, $grid")
    for name in "${beside[@]}"; do
        case $name in full) others+=("16 bits") ;; *) others+=("${name^^}, $bits bits, $grid") ;; esac
    done
done
reproduce "$device" "$model" lutgemm-perplexity --only "${own[@]}"
rows_beside lutgemm-perplexity "${others[@]}"
