#!/usr/bin/env bash
# AWQ: scale and clip search of our own, or what the model's file of the AWQ zoo says, if it is in modelzoo/llm-awq/
# (MODEL-w3-g128.pt, there or in its family's folder).
# Usage: llm_awq.sh FAMILY SIZE BITS GROUP_SIZE DEVICE      for example: llm_awq.sh vicuna-v1.5 7b 3 128 0
#   GROUP_SIZE  input channels per scale, -1 for one scale per row     DEVICE  cpu or a GPU index
# Environment: CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEED override the model's defaults; BEHIND=bos
# calibrates behind that prefix; OPTIONS: see common.sh. The checkpoint goes to modelzoo/quantized/, where eval.sh with
# the same arguments (and GROUP_SIZE) finds it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 5 ] || fail "usage: llm_awq.sh FAMILY SIZE BITS GROUP_SIZE DEVICE (got $# of 5 arguments)"
enter_project
model=$(model_directory "$1" "$2")
GROUP_SIZE=$4
choose_recipe awq "$3" "$model"
quantize "$5" "$model" "${recipe[@]}"
