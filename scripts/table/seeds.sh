#!/usr/bin/env bash
# Perplexity over calibration seeds: every method without a prefix, with [B], and calibrated behind [B], once per seed;
# then the table of all finished runs, mean ± standard deviation (n) over the seeds.
# Usage: seeds.sh DEVICE MODEL_PATH [METHOD]…      for example: seeds.sh cpu modelzoo/smollm2/smollm2-135m gptq-w3 gptq-w4
#   METHOD  gptq-w3, gptq-w4, smoothquant-w8a8, quarot, spqr, awq-w3, rtn-w8a8 (on static grids), omniquant-w3, awq-w4,
#           gptq-w4row (one grid per row); default: all. Others: reproduce ours-seeds --recipe NAME --behind --seeds 42 1
# Environment: SEEDS of the text to calibrate on (default "42 1 2 3"); EPOCHS of OmniQuant (default: the recipe's); CORPUS,
# WINDOW, LIMIT, CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH override the model's defaults, PROTOCOL the intactkv
# one; OPTIONS, WORKERS, MAX_MEMORY: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
table_call "DEVICE MODEL_PATH [METHOD]…" "$@"
BEHIND='' # an arm of the table's own
: "${SEEDS:=42 1 2 3}"
reproduce ours-seeds ${3:+--only full "${@:3}"} ${EPOCHS:+--set "omniquant-w3:weights.epochs=$EPOCHS"}
python -m eval table --model "$(basename "$model")" --over-seeds # the same runs, with changes over the seeds
