#!/usr/bin/env bash
# Needle in a haystack: a cache of full precision and of few bits, without and with [B]; a table and heat maps of all runs.
# Usage: needle.sh DEVICE MODEL_PATH      for example: needle.sh 0 modelzoo/llama-3.1-instruct/llama-3.1-instruct-8b
#   DEVICE  cpu, a GPU index, several joined by commas, which share the questions, or all
# Environment: KV_BITS (default "16 4 2"; 16 is full precision) of the policy KV (default per_head), PREFIXES (default
# "none bos"); LENGTHS=1024,2048 tokens, DEPTHS=0,50,100 per cent, KEYS of a cell, TEXT_SEED of their draw; or
# PUBLISHED=1: the five published keys in UNITS of UNIT_LINES lines on each side; CALIBRATION, CALIBRATION_SAMPLES,
# CALIBRATION_LENGTH, SEED of a policy or recipe that calibrates; OPTIONS (a recipe, …), MAX_MEMORY: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 2 ] || fail "usage: needle.sh DEVICE MODEL_PATH (got $# of 2 arguments)"
device=$1 model=$(model_path "$2")
enter_project
words prefixes PREFIXES "none bos"
grid=(
    ${LENGTHS:+--lengths "$LENGTHS"} ${DEPTHS:+--depths "$DEPTHS"} ${KEYS:+--keys "$KEYS"}
    ${TEXT_SEED:+--text-seed "$TEXT_SEED"} ${UNITS:+--units "$UNITS"} ${UNIT_LINES:+--lines "$UNIT_LINES"}
)
! flag PUBLISHED 0 || grid+=(--published)
for bits in ${KV_BITS:-16 4 2}; do
    kv=(--kv "${KV:-per_head}" --kv-bits "$bits")
    [ "$bits" != 16 ] || kv=(--kv none)
    choose_text "${kv[@]}" "${options[@]}"
    for prefix in "${prefixes[@]}"; do
        run_eval "$device" 29500 needle --model "$model" "${options[@]}" "${kv[@]}" "${text[@]}" --prefix "$prefix" \
            "${grid[@]}"
    done
done
python -m eval table needle --model "$(basename "$model")"
python -m eval plot needle --model "$(basename "$model")" ${LENGTHS:+--lengths "$LENGTHS"}
