#!/usr/bin/env bash
# PrefixQuant: perplexity in full precision, quantized without a prefix, and quantized behind it; its figures.
# Usage: run_prefixquant.sh DEVICE MODEL_PATH      for example: run_prefixquant.sh 0 modelzoo/llama-3/llama-3-8b
#   DEVICE  cpu or a GPU index
# Environment: RECIPE (default prefixquant-w4a4kv4-static; quantization --list names the others); FT=1 adds its
# fine-tuned form (EPOCHS, default the recipe's); PREFIX (default auto, what discovery finds); TRAINABLE=1 trains the
# prefix's embeddings first (PREFIX_LEN, PREFIX_EPOCHS); MSE_INIT_SIZE samples of the search; TASKS (as piqa,arc_easy)
# and DATA; PLOTS=0 leaves out the figures, which scripts/visualization/prefixquant.sh draws; CORPUS, WINDOW, LIMIT,
# CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH override the model's defaults.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -eq 2 ] || fail "usage: run_prefixquant.sh DEVICE MODEL_PATH (got $# of 2 arguments)"
model=$(realpath "$2")
enter_project
device=$(device_option "$1")
recipe=${RECIPE:-prefixquant-w4a4kv4-static} prefix=${PREFIX:-auto}
if [ "${TRAINABLE:-0}" = 1 ]; then
    trained=modelzoo/prefixes/$(basename "$model")-$recipe-trained.safetensors
    # Its keys and values must be in the basis of the quantized model: it is trained on the recipe's own twin.
    python -m intactkv train-prefix --model "$model" --device "$device" --recipe "$recipe" --prefix "$prefix" \
        ${PREFIX_LEN:+--prefix-len "$PREFIX_LEN"} ${PREFIX_EPOCHS:+--prefix-epochs "$PREFIX_EPOCHS"} \
        ${CALIBRATION:+--corpus "$CALIBRATION"} ${CALIBRATION_SAMPLES:+--samples "$CALIBRATION_SAMPLES"} \
        ${CALIBRATION_LENGTH:+--length "$CALIBRATION_LENGTH"} "${calibration[@]}" --out "$trained"
    prefix=$trained
fi
text=(${CORPUS:+--corpus "$CORPUS"} ${WINDOW:+--window "$WINDOW"} ${LIMIT:+--limit "$LIMIT"})
score() { # DEVICE, then a recipe's options
    run_eval "$1" 29500 ppl --model "$model" "${text[@]}" "${@:2}" > /dev/null
    [ -n "${TASKS:-}" ] || return 0
    run_eval "$1" 29500 tasks --model "$model" --tasks "$TASKS" ${DATA:+--data "$DATA"} "${@:2}" > /dev/null
}
search=("${calibration[@]}" ${MSE_INIT_SIZE:+--set "tuning.mse_init_size=$MSE_INIT_SIZE"})
score "$1"
for arm in none "$prefix"; do
    score "$1" --recipe "$recipe" --prefix "$arm" "${search[@]}"
done
if [ "${FT:-0}" = 1 ]; then
    score "$1" --recipe "$recipe-ft" --prefix "$prefix" "${search[@]}" ${EPOCHS:+--set "tuning.epochs=$EPOCHS"}
fi
python -m eval table --model "$(basename "$model")" --costs
[ -z "${TASKS:-}" ] || python -m eval table tasks --model "$(basename "$model")"
if [ "${PLOTS:-1}" = 1 ]; then
    # Of the model as it is: a trained prefix belongs to the rotated one.
    PREFIX=${PREFIX:-auto} bash scripts/visualization/prefixquant.sh "$1" "$model"
fi
