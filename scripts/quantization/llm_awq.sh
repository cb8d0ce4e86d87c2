#!/usr/bin/env bash
# AWQ: scale and clip search of our own (--set weights.file=… of `python -m quantization` takes a model-zoo file).
# Usage: llm_awq.sh FAMILY SIZE BITS GROUP_SIZE DEVICE      for example: llm_awq.sh vicuna-v1.5 7b 3 128 0
#   GROUP_SIZE  input channels per scale, -1 for one scale per row     DEVICE  cpu or a GPU index
# Environment: CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH override the model's defaults; BEHIND=bos calibrates
# behind that prefix. The checkpoint goes to modelzoo/quantized/, where eval.sh with the same arguments finds it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 5 ] || fail "usage: llm_awq.sh FAMILY SIZE BITS GROUP_SIZE DEVICE (got $# of 5 arguments)"
enter_project
quantize "$5" "$(model_directory "$1" "$2")" --recipe awq --bits "$3" --group-size "$4"
