#!/usr/bin/env bash
# GPTQ: act-order with static groups, true-sequential, seed 42. OPTIONS="--set weights.static_groups=false" for groups in
# the order of rounding, as in IntactKV's published rows (eval.sh: METHOD gptq-autogptq).
# Usage: auto_gptq.sh FAMILY MODEL BITS GROUP_SIZE DEVICE      for example: auto_gptq.sh vicuna-v1.5 vicuna-v1.5-7b 3 128 0
#   GROUP_SIZE  input channels per scale, -1 for one scale per row     DEVICE  cpu or a GPU index
# Environment: CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEED override the model's defaults; BEHIND=bos
# calibrates behind that prefix; OPTIONS: see common.sh. The checkpoint goes to modelzoo/quantized/, where eval.sh with
# the same arguments (and GROUP_SIZE) finds it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 5 ] || fail "usage: auto_gptq.sh FAMILY MODEL BITS GROUP_SIZE DEVICE (got $# of 5 arguments)"
enter_project
model=$(model_directory "$1" "$2")
GROUP_SIZE=$4
choose_recipe gptq "$3" "$model"
quantize "$5" "$model" "${recipe[@]}"
