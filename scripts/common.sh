# Sourced by the scripts that take the published arguments: errors, model directories, devices.

fail() { # one line, exit code 2
    echo "error: $*" >&2
    exit 2
}

enter_project() { # go to the checkout and use its environment; nothing here asks the hub
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    [ -x .venv/bin/python ] || fail ".venv is missing; run 'bash scripts/setup.sh' first"
    export HF_HUB_OFFLINE=1 PATH="$PWD/.venv/bin:$PATH"
}

model_directory() { # MODEL SIZE, where SIZE may be spelled 7b or vicuna-v1.5-7b
    echo "modelzoo/$1/$1-${2#"$1"-}"
}

need_gpu() { # INDEX: fail unless this machine shows a GPU of that index
    local count
    count=$(python -c 'import torch; print(torch.cuda.device_count())')
    [ "$1" -lt "$count" ] || fail "GPU index $1 is not there: this machine shows $count CUDA GPUs; choose another or cpu"
}

device_option() { # DEVICE: cpu or one GPU index, as the programs' --device spells it
    case "$1" in
        cpu) echo cpu ;;
        *[!0-9]* | "") fail "device '$1' is not known; give cpu or a GPU index such as 0" ;;
        *) need_gpu "$1" && echo "cuda:$1" ;;
    esac
}

calibration=( # what the environment says of the text that methods calibrate on
    ${CALIBRATION:+--calibration "$CALIBRATION"}
    ${CALIBRATION_SAMPLES:+--calibration-samples "$CALIBRATION_SAMPLES"}
    ${CALIBRATION_LENGTH:+--calibration-length "$CALIBRATION_LENGTH"}
)

quantize() { # DEVICE MODEL_DIRECTORY, then a recipe's options; BEHIND=bos calibrates behind that prefix
    local device
    device=$(device_option "$1")
    python -m quantization --model "$2" --device "$device" "${@:3}" "${calibration[@]}" \
        ${BEHIND:+--calibrate-behind-prefix --prefix "$BEHIND"}
}

arms() { # PROGRAM DEVICE PORT MODEL_DIRECTORY, then options: vanilla, with [B], and calibrated behind BEHIND
    local prefixes=("--prefix none" "--prefix bos") prefix
    [ -z "${BEHIND:-}" ] || prefixes+=("--prefix $BEHIND --calibrate-behind-prefix")
    for prefix in "${prefixes[@]}"; do
        # shellcheck disable=SC2086 # a prefix is several words
        run_eval "$2" "$3" "$1" --model "$4" "${@:5}" "${calibration[@]}" $prefix ${LIMIT:+--limit "$LIMIT"}
    done
}

perplexities() { # DEVICE PORT MODEL_DIRECTORY, then a recipe's options
    arms ppl "$@" ${CORPUS:+--corpus "$CORPUS"} ${WINDOW:+--window "$WINDOW"}
    python -m eval table --model "$(basename "$3")" --costs # all finished runs of the model, to compare
}

task_scores() { # TASKS DEVICE PORT MODEL_DIRECTORY, then a recipe's options
    arms tasks "${@:2}" --tasks "$1" ${DATA:+--data "$DATA"} ${FEWSHOT:+--fewshot "$FEWSHOT"} \
        ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"}
    python -m eval table tasks --model "$(basename "$4")"
}

paper_table() { # NUMBER PROGRAM, then the script's own arguments: full precision and 3-bit weights, both arms
    # The caller's array `scored` says what the program scores.
    local number=$1 program=$2 device=$3 model methods=(rtn gptq omniquant awq) method recipe
    model=$(realpath -m "$4")
    [ $# -le 4 ] || methods=("${@:5}")
    for method in "${methods[@]}"; do
        [[ " rtn gptq omniquant awq " = *" $method "* ]] ||
            fail "method '$method' is not in the table; choose from rtn, gptq, omniquant, awq"
    done
    enter_project
    local text=("${calibration[@]}" ${SEED:+--seed "$SEED"}) BEHIND='' # the paper's tables have no such arm
    # In full precision the prefix changes nothing, and the table has no place for it.
    run_eval "$device" 29500 "$program" --model "$model" "${scored[@]}" ${LIMIT:+--limit "$LIMIT"} > /dev/null
    for method in "${methods[@]}"; do
        recipe=(--recipe "$method" --bits 3) calibration=()
        case $method in
            gptq | awq) calibration=("${text[@]}") ;;
            omniquant) calibration=("${text[@]}" ${EPOCHS:+--set "weights.epochs=$EPOCHS"}) ;;
        esac
        arms "$program" "$device" 29500 "$model" "${recipe[@]}" "${scored[@]}" > /dev/null
    done
    python -m eval table "$number" --model "$(basename "$model")"
}

run_eval() { # DEVICE PORT, then the arguments of `python -m eval`
    # DEVICE: cpu, one GPU index, or several joined by commas; indices count within CUDA_VISIBLE_DEVICES if that is set.
    local device=$1 port=$2
    shift 2
    case "$device" in
        cpu) python -m eval "$@" --device cpu ;;
        *,*)
            local visible=$device gpu
            for gpu in ${device//,/ }; do need_gpu "$gpu"; done
            if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
                local all index
                IFS=, read -ra all <<< "$CUDA_VISIBLE_DEVICES"
                visible=
                for index in ${device//,/ }; do
                    [ -n "${all[$index]:-}" ] || fail "GPU index $index is not among CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"
                    visible+="${visible:+,}${all[$index]}"
                done
            fi
            local commas=${device//[!,]/}
            CUDA_VISIBLE_DEVICES=$visible accelerate launch --multi_gpu --num_processes $((${#commas} + 1)) \
                --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port "$port" -m eval "$@"
            ;;
        *[!0-9]* | "") fail "device '$device' is not known; give cpu, a GPU index such as 0, or several: 0,1" ;;
        *) python -m eval "$@" --device "cuda:$device" ;;
    esac
}
