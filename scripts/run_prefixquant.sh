#!/usr/bin/env bash
# PrefixQuant: perplexity and tasks in full precision, quantized without a prefix, and quantized behind it; its figures.
# Usage: run_prefixquant.sh DEVICE MODEL_PATH      for example: run_prefixquant.sh 0 modelzoo/llama-3/llama-3-8b
#   DEVICE  cpu, a GPU index, several joined by commas, or all (what is trained and drawn is on GPU 0 then)
# Environment: RECIPE (default prefixquant-w4a4kv4-static; quantization --list names the others); FT=1 adds its
# fine-tuned form (EPOCHS, default the recipe's); PREFIX (default auto, what discovery finds); TRAINABLE=1 trains the
# prefix's embeddings first (PREFIX_LEN, PREFIX_EPOCHS; TRAIN_OPTIONS="--prefix-lr 1e-3 …" any other of train-prefix);
# MSE_INIT_SIZE samples of the search; TASKS=piqa,arc_easy with DATA, FEWSHOT, BATCH_SIZE; PLOTS=0 leaves out the figures,
# which scripts/visualization/prefixquant.sh draws; CORPUS, WINDOW, LIMIT and PROTOCOL (default gptq: plain windows, C4's
# old draw), MMLU_PROTOCOL (default lm-eval); CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEED; OPTIONS of the
# quantized runs and of the training, WORKERS, MAX_MEMORY: see common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
table_call "DEVICE MODEL_PATH" "$@"
for name in FT TRAINABLE PLOTS; do flag $name 0 || true; done # now, and not behind hours of rows
[[ ${TASKS:=none} =~ ^[^,[:space:]]+(,[^,[:space:]]+)*$ ]] || fail "TASKS='$TASKS' are no names; give them joined by commas"
check_device "$device"
one=${device%%,*} one=${one/#all/0}
recipe=${RECIPE:-prefixquant-w4a4kv4-static} prefix=${PREFIX:-auto}
table=prefixquant-w4a4kv4
[[ $recipe != *w4a8kv4* ]] || table=prefixquant-w4a8kv4
if flag TRAINABLE 0; then
    trained=${home}modelzoo/prefixes/$(basename "$model")-$recipe-trained.safetensors
    words training TRAIN_OPTIONS
    where=$(device_option "$one")
    # Its keys and values must be in the basis of the quantized model: it is trained on the recipe's own twin.
    python -m intactkv train-prefix --model "$model" --device "$where" --recipe "$recipe" --prefix "$prefix" \
        ${PREFIX_LEN:+--prefix-len "$PREFIX_LEN"} ${PREFIX_EPOCHS:+--prefix-epochs "$PREFIX_EPOCHS"} \
        ${CALIBRATION:+--corpus "$CALIBRATION"} ${CALIBRATION_SAMPLES:+--samples "$CALIBRATION_SAMPLES"} \
        ${CALIBRATION_LENGTH:+--length "$CALIBRATION_LENGTH"} ${SEED:+--training-seed "$SEED"} "${training[@]}" \
        "${calibration[@]}" "${options[@]}" --out "$trained"
    prefix=$trained
fi
BEHIND='' # there is no such arm: the recipes are calibrated behind the prefix
search=(${MSE_INIT_SIZE:+--set "tuning.mse_init_size=$MSE_INIT_SIZE"})
reproduce $table --recipe fp16 "$recipe" --prefix none "$prefix" "${search[@]}"
! flag FT 0 || reproduce $table --recipe "$recipe-ft" --prefix "$prefix" "${search[@]}" \
    ${EPOCHS:+--set "tuning.epochs=$EPOCHS"}
# Of the model as it is: a trained prefix belongs to the rotated one.
! flag PLOTS 1 || PREFIX=${PREFIX:-auto} OPTIONS='' bash scripts/visualization/prefixquant.sh "$one" "$model"
