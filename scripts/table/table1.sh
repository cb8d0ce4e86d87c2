#!/usr/bin/env bash
# Table 1 of IntactKV: perplexity in full precision and of 3-bit weights, alone and with IntactKV_[B], beside the
# published figures.
# Usage: table1.sh DEVICE MODEL_PATH [METHOD]…      for example: table1.sh 0 modelzoo/llama-2/llama-2-7b gptq awq
#   METHOD  rtn, gptq (by AutoGPTQ, as published: the recipe gptq-autogptq), omniquant, awq (default: all)
# Environment: CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEED of the text to calibrate on; EPOCHS of
# OmniQuant; CORPUS, WINDOW, LIMIT what is scored (the table shows c4; by default wikitext2 is scored, too), PROTOCOL
# (default intactkv); OPTIONS of the quantized rows, MAX_MEMORY: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 2 ] || fail "usage: table1.sh DEVICE MODEL_PATH [METHOD]… (got $# of at least 2 arguments)"
paper_table 1 ppl "$@"
