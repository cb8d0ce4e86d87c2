#!/usr/bin/env bash
# Perplexity over calibration seeds: every method without a prefix, with [B], and calibrated behind [B], once per seed;
# then the table of all finished runs, mean ± standard deviation (n) over the seeds.
# Usage: seeds.sh DEVICE MODEL_PATH [METHOD]…      for example: seeds.sh cpu modelzoo/smollm2/smollm2-135m gptq-w3 gptq-w4
#   METHOD  a named recipe that calibrates, rtn-w8a8 (on static grids), or gptq-w4row (gptq, 4 bits, one grid per row)
#           (default: gptq-w3 gptq-w4 smoothquant-w8a8 quarot spqr awq-w3 rtn-w8a8 omniquant-w3 awq-w4 gptq-w4row)
# Environment: SEEDS of the text to calibrate on (default "42 1 2 3"); EPOCHS of OmniQuant (default: the recipe's); CORPUS,
# WINDOW, LIMIT, CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH override the model's defaults, PROTOCOL the intactkv
# one; OPTIONS, WORKERS, MAX_MEMORY: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 2 ] || fail "usage: seeds.sh DEVICE MODEL_PATH [METHOD]… (got $# of at least 2 arguments)"
device=$1 model=$(model_path "$2")
shift 2
enter_project
: "${SEEDS:=42 1 2 3}"
declared=(full) others=()
for method in "$@"; do
    if named "$method" gptq-w3 gptq-w4 smoothquant-w8a8 quarot spqr awq-w3 rtn-w8a8 omniquant-w3 awq-w4 gptq-w4row; then
        declared+=("$method")
    else
        others+=("$method")
    fi
done
epochs=(${EPOCHS:+--set "omniquant-w3:weights.epochs=$EPOCHS"})
BEHIND='' # an arm of the table's own
[ $# -gt 0 ] && [ "${#declared[@]}" -eq 1 ] ||
    reproduce "$device" "$model" ours-seeds ${1:+--only "${declared[@]}"} "${epochs[@]}"
BEHIND=bos
[ "${#others[@]}" -eq 0 ] || reproduce "$device" "$model" ours-seeds --recipe "${others[@]}"
python -m eval table --model "$(basename "$model")" --over-seeds # the same runs, with changes over the seeds
