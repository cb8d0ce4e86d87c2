#!/usr/bin/env bash
# Talk with a model in the terminal, or let it answer a script.
# Usage: chat.sh DEVICE MODEL_PATH      for example: chat.sh cpu modelzoo/smollm2/smollm2-135m
#   DEVICE  cpu, a GPU index, or all: one model over all GPUs
# Environment: METHOD and BITS (a recipe and the bits of its weights), KV_BITS (16 is full precision) of the policy KV,
# PREFIX=prompt|bos|…; SCRIPT=FILE or PROMPTS="riddle distillation" in place of a terminal, MAX_NEW_TOKENS of an answer,
# OUT=FILE.json for the transcript, COMPARE=1 for the first token that full precision says otherwise; GROUP_SIZE,
# CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEED of a method or policy; OPTIONS, MAX_MEMORY: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 2 ] || fail "usage: chat.sh DEVICE MODEL_PATH (got $# of 2 arguments)"
[[ $1 != *,* ]] || fail "device '$1' shares work among GPUs, a conversation is one; give cpu, a GPU index or all"
model=$(model_path "$2")
[ -z "${SCRIPT:-}" ] || SCRIPT=$(realpath -m -- "$SCRIPT")
[ -z "${OUT:-}" ] || OUT=$(realpath -ms -- "$OUT")
enter_project
choose_method "${METHOD:-${BITS:+fp16}}" "${BITS:-16}" "$model" "${KV_BITS:-}"
words prompts PROMPTS
compare=()
! flag COMPARE 0 || compare=(--compare)
run_eval "$1" 29500 chat --model "$model" "${method[@]}" ${PREFIX:+--prefix "$PREFIX"} \
    "${prompts[@]/#/--prompt=}" ${SCRIPT:+--script "$SCRIPT"} ${MAX_NEW_TOKENS:+--max-new-tokens "$MAX_NEW_TOKENS"} \
    ${OUT:+--out "$OUT"} "${compare[@]}"
