#!/usr/bin/env bash
# Evaluate a method, vanilla and with IntactKV_[B].
# Usage: eval.sh MODEL SIZE METHOD BITS KV_BITS TASK PORT DEVICE      for example: eval.sh llama-2 7b rtn 3 16 ppl 29500 0
#   METHOD  a recipe: fp16, rtn, gptq, awq, omniquant, spqr, bcq, …          BITS  of the weights, 16 with fp16
#   KV_BITS 2 to 8, or 16 for full precision
#   TASK    ppl, mmlu (5 shots), qa (seven tasks, no shots), or any task of lm-eval: gsm8k, piqa, bbh, …
#   PORT    of accelerate, used with several GPUs
#   DEVICE  cpu, a GPU index, or several joined by commas
# Environment: GROUP_SIZE, CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH override the model's defaults, as do
# CORPUS and WINDOW for ppl, DATA=local|sample|hub, FEWSHOT and BATCH_SIZE for tasks; LIMIT windows, or questions of a
# task; BEHIND=bos adds the weights that are calibrated behind that prefix.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 8 ] || fail "usage: eval.sh MODEL SIZE METHOD BITS KV_BITS TASK PORT DEVICE (got $# of 8 arguments)"
enter_project
model=$(model_directory "$1" "$2") method=$3 bits=$4 kv_bits=$5 task=$6 port=$7 device=$8

recipe=(--recipe "$method" ${GROUP_SIZE:+--group-size "$GROUP_SIZE"})
[ "$bits" = 16 ] || recipe+=(--bits "$bits")
[ "$kv_bits" = 16 ] || recipe+=(--kv-bits "$kv_bits")

if [ "$task" = ppl ]; then
    perplexities "$device" "$port" "$model" "${recipe[@]}"
else
    task_scores "$task" "$device" "$port" "$model" "${recipe[@]}"
fi
