#!/usr/bin/env bash
# GPTQ's own setting: 4 bits, one grid per row, act-order, seed 0; perplexity vanilla and with [B].
# Usage: run_gptq.sh DEVICE MODEL_PATH      for example: run_gptq.sh 0 modelzoo/llama-2/llama-2-7b
# Environment: CORPUS, WINDOW, LIMIT, CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH override the model's defaults;
# BEHIND=bos adds the weights that are calibrated behind that prefix.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -eq 2 ] || fail "usage: run_gptq.sh DEVICE MODEL_PATH (got $# of 2 arguments)"
model=$(realpath "$2")
enter_project
perplexities "$1" 29500 "$model" --recipe gptq-row
