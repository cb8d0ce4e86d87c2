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
model=$(model_directory "$1" "$2") task=$6 port=$7 device=$8 table=(tasks)
choose_method "$3" "$4" "$model" "$5"
protocol=${PROTOCOL:-intactkv} mmlu_protocol=${MMLU_PROTOCOL:-hendrycks}
echo "measured as in IntactKV's tables unless PROTOCOL or MMLU_PROTOCOL is set: perplexity by --protocol $protocol," \
    "MMLU by $mmlu_protocol" >&2

arms() { # PROGRAM, then its options: without a prefix, with [B], and calibrated behind BEHIND
    local prefix made=("$1" --model "$model" "${method[@]}" "${@:2}" ${LIMIT:+--limit "$LIMIT"})
    for prefix in none bos; do run_eval "$device" "$port" "${made[@]}" --prefix "$prefix"; done
    [ -z "$behind" ] || run_eval "$device" "$port" "${made[@]}" --prefix "$behind" --calibrate-behind-prefix
}
asked=(${FEWSHOT:+--fewshot "$FEWSHOT"} ${DATA:+--data "$DATA"} ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"})
case ,$task, in
    ,ppl,)
        arms ppl --protocol "$protocol" ${CORPUS:+--corpus "$CORPUS"} ${WINDOW:+--window "$WINDOW"}
        table=(--costs) # all finished runs of the model, to compare
        ;;
    *,mmlu,*) arms tasks --tasks "$task" --protocol "$mmlu_protocol" "${asked[@]}" ;;
    *) arms tasks --tasks "$task" "${asked[@]}" ;;
esac
python -m eval table "${table[@]}" --model "$(basename "$model")"
