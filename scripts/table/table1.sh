#!/usr/bin/env bash
# Table 1 of IntactKV: perplexity in full precision and of 3-bit weights, alone and with IntactKV_[B], beside the
# published figures.
# Usage: table1.sh DEVICE MODEL_PATH [METHOD]…      for example: table1.sh 0 modelzoo/llama-2/llama-2-7b gptq awq
#   METHOD  rtn, gptq (by AutoGPTQ, as published: the recipe gptq-autogptq), omniquant, awq (default: all)
# Environment: CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEEDS of the text to calibrate on; EPOCHS of
# OmniQuant; CORPUS, WINDOW, LIMIT what is scored (default: c4), PROTOCOL (default
# intactkv); OPTIONS of the quantized rows, WORKERS, MAX_MEMORY: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
intactkv_table 1 "$@"
