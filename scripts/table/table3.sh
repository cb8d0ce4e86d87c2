#!/usr/bin/env bash
# Table 3 of IntactKV: seven question answering tasks without shots, in full precision and of 3-bit weights, alone and
# with IntactKV_[B], beside the published figures.
# Usage: table3.sh DEVICE MODEL_PATH [METHOD]…      for example: table3.sh 0 modelzoo/vicuna-v1.5/vicuna-v1.5-7b gptq
#   METHOD  rtn, gptq (by AutoGPTQ, as published: the recipe gptq-autogptq), omniquant, awq (default: all)
# Environment: CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEEDS of the text to calibrate on; EPOCHS of
# OmniQuant; DATA=local|sample|hub, LIMIT (questions a task), BATCH_SIZE of the tasks; OPTIONS of the
# quantized rows, WORKERS, MAX_MEMORY: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
intactkv_table 3 "$@"
