#!/usr/bin/env bash
# Table 5 of IntactKV: perplexity in full precision, of QuaRot (W4A4KV4) and of QuaRot with IntactKV_[B], beside the
# published figures.
# Usage: quarot.sh MODEL SIZE DEVICE      for example: quarot.sh llama-2 7b 0
#   DEVICE  cpu, a GPU index, several joined by commas, or all
# Environment: CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEEDS of the text to calibrate on; CORPUS, WINDOW,
# LIMIT what is scored (default: c4), PROTOCOL (default intactkv); BEHIND=bos adds the weights that are calibrated behind
# that prefix; OPTIONS, WORKERS, MAX_MEMORY: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 3 ] || fail "usage: quarot.sh MODEL SIZE DEVICE (got $# of 3 arguments)"
enter_project
device=$3 model=$(model_directory "$1" "$2")
reproduce intactkv-5 --only fp16 QuaRot
