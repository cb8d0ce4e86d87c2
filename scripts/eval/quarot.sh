#!/usr/bin/env bash
# Table 5 of IntactKV: perplexity in full precision, of QuaRot (W4A4KV4) and of QuaRot with IntactKV_[B], beside the
# published figures.
# Usage: quarot.sh MODEL SIZE DEVICE      for example: quarot.sh llama-2 7b 0
#   DEVICE  cpu, a GPU index, several joined by commas, or all
# Environment: CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEED of the text to calibrate on; CORPUS, WINDOW,
# LIMIT what is scored (the table shows c4; by default wikitext2 is scored, too), PROTOCOL (default intactkv); BEHIND=bos
# adds the weights that are calibrated behind that prefix; OPTIONS, MAX_MEMORY: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 3 ] || fail "usage: quarot.sh MODEL SIZE DEVICE (got $# of 3 arguments)"
enter_project
model=$(model_directory "$1" "$2")
measure_as intactkv
run_eval "$3" 29500 ppl --model "$model" "${scored[@]}" ${LIMIT:+--limit "$LIMIT"} > /dev/null
perplexities "$3" 29500 "$model" --recipe quarot
python -m eval table 5 --model "$(basename "$model")"
