#!/usr/bin/env bash
# Answer MT-bench's questions with a quantized chat model, vanilla, with IntactKV_[P] and with the one that train.sh has
# trained for the same arguments, if it has; once for every seed.
# Usage: gen_mtbench_answer.sh MODEL SIZE METHOD BITS DEVICE      for example: gen_mtbench_answer.sh vicuna-v1.5 7b awq 3 0
#   METHOD  a recipe: fp16, rtn, gptq, awq, omniquant, …          BITS  of the weights, 16 with fp16
#   DEVICE  cpu, a GPU index, several joined by commas, which share the questions, or all
# Environment: MTBENCH_QUESTIONS=mt_bench|sample|FILE, MAX_NEW_TOKENS of a turn, SEEDS (default "42 43 44"), PREFIXES
# (default "none prompt" and the trained file), LIMIT questions, BATCH_SIZE dialogues; GROUP_SIZE, CALIBRATION,
# CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEED override the model's defaults; OPTIONS, MAX_MEMORY: see common.sh. The
# answers lie in outputs/mt_bench/model_answer/; judge.sh grades them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 5 ] || fail "usage: gen_mtbench_answer.sh MODEL SIZE METHOD BITS DEVICE (got $# of 5 arguments)"
enter_project
model=$(model_directory "$1" "$2")
choose_method "$3" "$4" "$model"
trained=$(trained_prefix "$model" "$3" "$4")
if [ -n "${PREFIXES:-}" ]; then
    words prefixes PREFIXES
elif [ -f "$trained" ]; then
    echo "arms: vanilla, [P], [P] trained: $trained" >&2
    prefixes=(none prompt "$trained")
else
    echo "arms: vanilla, [P]; $trained is not there (train.sh $1 $2 $3 $4 DEVICE makes it), so none trained" >&2
    prefixes=(none prompt)
fi
for seed in ${SEEDS:-42 43 44}; do
    for prefix in "${prefixes[@]}"; do
        run_eval "$5" 29500 mtbench --model "$model" "${method[@]}" \
            --prefix "$prefix" --answer-seed "$seed" ${MTBENCH_QUESTIONS:+--questions "$MTBENCH_QUESTIONS"} \
            ${MAX_NEW_TOKENS:+--max-new-tokens "$MAX_NEW_TOKENS"} ${LIMIT:+--limit "$LIMIT"} \
            ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"}
    done
done
