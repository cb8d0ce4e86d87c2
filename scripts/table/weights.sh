#!/usr/bin/env bash
# The weight-only table: every method at 4 and 3 bits in groups and at 4 bits per row, vanilla, with [B], and calibrated
# behind [B]; perplexity, and what quantizing took.
# Usage: weights.sh DEVICE MODEL_PATH [METHOD]…      for example: weights.sh 0 modelzoo/llama-2/llama-2-7b gptq awq
#   METHOD  rtn, gptq, awq, omniquant, spqr, bcq (default: all)
# Environment: EPOCHS of OmniQuant (default: the recipe's), and what eval.sh takes: CORPUS, WINDOW, LIMIT, PROTOCOL,
# CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEEDS; OPTIONS, WORKERS, MAX_MEMORY: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
table_call "DEVICE MODEL_PATH [METHOD]…" "$@"
BEHIND='' # an arm of the table's own
reproduce ours-weights ${3:+--only full "${@:3}"} ${EPOCHS:+--set "omniquant:weights.epochs=$EPOCHS"}
python -m eval table --model "$(basename "$model")" --costs # the same runs, with standard errors and what quantizing took
