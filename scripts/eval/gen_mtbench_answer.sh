#!/usr/bin/env bash
# Answer MT-bench's questions with a quantized chat model, vanilla and with IntactKV_[P], once for every seed.
# Usage: gen_mtbench_answer.sh MODEL SIZE METHOD BITS DEVICE      for example: gen_mtbench_answer.sh vicuna-v1.5 7b awq 3 0
#   METHOD  a recipe: fp16, rtn, gptq, awq, omniquant, …          BITS  of the weights, 16 with fp16
#   DEVICE  cpu, a GPU index, or several joined by commas, which share the questions
# Environment: MTBENCH_QUESTIONS=mt_bench|sample|FILE, MAX_NEW_TOKENS of a turn, SEEDS (default "42 43 44"), PREFIXES
# (default "none prompt"; also files that train.sh wrote), LIMIT questions, BATCH_SIZE dialogues; GROUP_SIZE, CALIBRATION,
# CALIBRATION_SAMPLES, CALIBRATION_LENGTH override the model's defaults. The answers lie in
# outputs/mt_bench/model_answer/; judge.sh grades them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 5 ] || fail "usage: gen_mtbench_answer.sh MODEL SIZE METHOD BITS DEVICE (got $# of 5 arguments)"
enter_project
model=$(model_directory "$1" "$2") method=$3 bits=$4

recipe=(--recipe "$method" ${GROUP_SIZE:+--group-size "$GROUP_SIZE"})
[ "$bits" = 16 ] || recipe+=(--bits "$bits")
for seed in ${SEEDS:-42 43 44}; do
    for prefix in ${PREFIXES:-none prompt}; do
        run_eval "$5" 29500 mtbench --model "$model" "${recipe[@]}" "${calibration[@]}" \
            --prefix "$prefix" --answer-seed "$seed" ${MTBENCH_QUESTIONS:+--questions "$MTBENCH_QUESTIONS"} \
            ${MAX_NEW_TOKENS:+--max-new-tokens "$MAX_NEW_TOKENS"} ${LIMIT:+--limit "$LIMIT"} \
            ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"}
    done
done
