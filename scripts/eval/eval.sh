#!/usr/bin/env bash
# Evaluate a method, vanilla and with IntactKV_[B].
# Usage: eval.sh MODEL SIZE METHOD BITS KV_BITS TASK PORT DEVICE      for example: eval.sh llama-2 7b rtn 3 16 ppl 29500 0
#   METHOD  a recipe: fp16, rtn, gptq, awq, omniquant, spqr, bcq, …          BITS  of the weights, 16 with fp16
#   KV_BITS 2 to 8, or 16 for full precision; KV=kivi (or another policy of `python -m eval ppl --help`) in the
#           environment says how they are rounded, per_head otherwise
#   TASK    ppl, mmlu (5 shots), qa (seven tasks, no shots), or any task of lm-eval: gsm8k, piqa, bbh, …
#   PORT    of accelerate, used with several GPUs
#   DEVICE  cpu, a GPU index, several joined by commas, or all: one model over all GPUs
# Environment: GROUP_SIZE, CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEED override the model's defaults, as do
# CORPUS and WINDOW for ppl, DATA=local|sample|hub, FEWSHOT and BATCH_SIZE for tasks; LIMIT windows, or questions of a
# task; PROTOCOL (default intactkv), MMLU_PROTOCOL (default hendrycks); BEHIND=bos adds the weights that are calibrated
# behind that prefix; OPTIONS, MAX_MEMORY: see common.sh. awq takes the model's file of the AWQ zoo from modelzoo/llm-awq/
# (MODEL-w3-g128.pt, there or in its family's folder), if it is there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 8 ] || fail "usage: eval.sh MODEL SIZE METHOD BITS KV_BITS TASK PORT DEVICE (got $# of 8 arguments)"
enter_project
model=$(model_directory "$1" "$2") task=$6
choose_recipe "$3" "$4" "$model"
read_kv "$3" "$5"
recipe+=("${kv[@]}")
measure_as intactkv
if [ "$task" = ppl ]; then
    perplexities "$8" "$7" "$model" "${recipe[@]}"
    python -m eval table --model "$(basename "$model")" --costs # all finished runs of the model, to compare
else
    task_scores "$task" "$8" "$7" "$model" "${recipe[@]}"
    python -m eval table tasks --model "$(basename "$model")"
fi
