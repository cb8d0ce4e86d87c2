#!/usr/bin/env bash
# SpQR's setting of four bits a weight in all: 3-bit codes, two-level grids, outliers kept; perplexity.
# Usage: run_spqr.sh DEVICE MODEL_PATH      for example: run_spqr.sh 0 modelzoo/llama-2/llama-2-7b
# Environment: CORPUS, WINDOW, LIMIT, CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH override the model's defaults;
# BEHIND=bos adds the weights that are calibrated behind that prefix.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -eq 2 ] || fail "usage: run_spqr.sh DEVICE MODEL_PATH (got $# of 2 arguments)"
model=$(realpath "$2")
enter_project
perplexities "$1" 29500 "$model" --recipe spqr
