#!/usr/bin/env bash
# Calibrate IntactKV_[P] of a quantized model on conversations.
# Usage: train.sh MODEL SIZE METHOD BITS DEVICE      for example: train.sh vicuna-v1.5 7b awq 3 0
#   METHOD  a recipe that quantizes weights: rtn, gptq, awq, omniquant, spqr, bcq          BITS  of the weights
#   DEVICE  cpu or a GPU index
# Environment: PREFIX (default: prompt), OUT (default: modelzoo/prefixes/MODEL-SIZE-METHOD-wBITS-cal.safetensors, with
# gGROUP_SIZE behind the bits if that is set); GROUP_SIZE, CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEED of
# the weights; CONVERSATIONS, SAMPLES, HELD_OUT, MAX_LENGTH, STEPS, BATCH_SIZE, LEARNING_RATE, EVALUATE_EVERY of the
# training (published: 128 conversations of 1024 tokens, 160 steps of 16); CHECKPOINTING=1 where memory is short; OPTIONS:
# see common.sh. gen_mtbench_answer.sh with the same arguments finds what is written by default.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 5 ] || fail "usage: train.sh MODEL SIZE METHOD BITS DEVICE (got $# of 5 arguments)"
enter_project
device=$(device_option "$5")
model=$(model_directory "$1" "$2")
again=()
! flag CHECKPOINTING 0 || again=(--checkpointing)
choose_method "$3" "$4" "$model"
python -m intactkv calibrate --model "$model" --device "$device" "${method[@]}" \
    --prefix "${PREFIX:-prompt}" --out "${OUT:-$(trained_prefix "$model" "$3" "$4")}" \
    ${CONVERSATIONS:+--conversations "$CONVERSATIONS"} ${SAMPLES:+--samples "$SAMPLES"} ${HELD_OUT:+--held-out "$HELD_OUT"} \
    ${MAX_LENGTH:+--max-length "$MAX_LENGTH"} ${STEPS:+--steps "$STEPS"} ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"} \
    ${LEARNING_RATE:+--learning-rate "$LEARNING_RATE"} ${EVALUATE_EVERY:+--evaluate-every "$EVALUATE_EVERY"} \
    "${again[@]}"
