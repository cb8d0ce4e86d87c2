#!/usr/bin/env bash
# LUT-GEMM's binary coding: one set of scales per row, 30 rounds; perplexity vanilla and with [B].
# Usage: run_lutgemm.sh DEVICE MODEL_PATH BITS      for example: run_lutgemm.sh 0 modelzoo/llama-2/llama-2-7b 3
# Environment: CORPUS, WINDOW, LIMIT override the model's defaults. It looks at no calibration text.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -eq 3 ] || fail "usage: run_lutgemm.sh DEVICE MODEL_PATH BITS (got $# of 3 arguments)"
model=$(realpath "$2")
enter_project
calibration=() BEHIND=
perplexities "$1" 29500 "$model" --recipe bcq-row --bits "$3"
