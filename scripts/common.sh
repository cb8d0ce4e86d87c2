# shellcheck shell=bash
# Sourced by the scripts that take the published arguments. Every script may be told by the environment, too:
#   INTACTKV_ROOT=DIR             holds modelzoo/, datasets/ and outputs/ in place of the checkout, as for the programs
#   OPTIONS="--set a.b=c …"       any other options of the programs, for every step that runs a method; quotes within keep
#                                 spaces together: OPTIONS="--corpus 'my text.txt'". In a table they reach every row but
#                                 full precision, and "--set gptq:weights.damp=0.1" the rows of that method
#   PROTOCOL, MMLU_PROTOCOL       how perplexity and MMLU are measured (default: as in the project that the call is of)
#   CALIBRATION, CALIBRATION_SAMPLES, CALIBRATION_LENGTH, SEED     the text that a method calibrates on
#   MAX_MEMORY=65GiB              with DEVICE all: what a model may take of each GPU
# Of the scripts that run a table, SEEDS="42 1 2" stands for SEED, too, and:
#   TASKS=boolq,mmlu              columns of these tasks (default: those of the table for IntactKV's, none for the others)
#   BESIDE="full rtn"             rows of the table that stand beside the script's own: full precision, other methods
#   WORKERS=2                     how many runs at a time (default: one for every GPU)

fail() { # one line, exit code 2
    echo "error: $*" >&2
    exit 2
}

set -f # a word of a variable is no pattern: `*` stays what it is
home= # in front of modelzoo/ and outputs/; nothing for the checkout
if [ -n "${INTACTKV_ROOT:-}" ]; then
    [ -d "$INTACTKV_ROOT" ] || fail "INTACTKV_ROOT='$INTACTKV_ROOT' is no directory; make it, name another, or unset it"
    INTACTKV_ROOT=$(realpath -s -- "$INTACTKV_ROOT") home=$INTACTKV_ROOT/ # the scripts leave the caller's directory
fi

words() { # ARRAY VARIABLE [DEFAULT]: sets the array to the words of the variable, also over several lines
    local -n into=$1
    local lines
    lines=$(xargs -r printf '%s\n' <<< "${!2:-${3:-}}" 2> /dev/null) || fail "$2: a quote is not closed; close it: '${!2}'"
    into=()
    [ -z "$lines" ] || mapfile -t into <<< "$lines"
}

flag() { # VARIABLE DEFAULT: whether it is 1; 0 is not, and nothing else is either
    case ${!1:-$2} in
        1) return 0 ;;
        0) return 1 ;;
        *) fail "$1='${!1}' is not allowed; give 1 or 0" ;;
    esac
}

enter_project() { # go to the checkout and use its environment; nothing here asks the hub
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
    [ -x .venv/bin/python ] || fail ".venv is missing; run 'bash scripts/setup.sh' first"
    export HF_HUB_OFFLINE=1 PATH="$PWD/.venv/bin:$PATH"
}

# Models and methods ---------------------------------------------------------------------------------------------------

model_path() { # PATH: absolute, links as they are: a model is called what its directory is called, in every script
    [ -n "$1" ] || fail "the model's path is empty; give its directory"
    realpath -ms -- "$1"
}

model_directory() { # MODEL SIZE, where SIZE may be spelled 7b or vicuna-v1.5-7b
    [ -n "$1" ] && [ -n "$2" ] || fail "the model's family or size is empty; give both, for example llama-2 7b"
    local place=modelzoo/$1/$1-${2#"$1"-}
    [ -e "$home$place" ] || [ ! -e "${home}modelzoo/$1/$2" ] ||
        fail "$place is missing; a model is called FAMILY/FAMILY-SIZE, so give modelzoo/$1/$2 that name (a link will do)"
    model_path "$home$place"
}

trained_prefix() { # MODEL_DIRECTORY METHOD BITS: where train.sh leaves what it has trained for them
    echo "${home}modelzoo/prefixes/$(basename "$1")-$2-w$3${GROUP_SIZE:+g$GROUP_SIZE}-cal.safetensors"
}

zoo_file() { # MODEL_DIRECTORY BITS GROUP_SIZE: the model's file of the AWQ zoo in modelzoo/llm-awq, if it is there
    local name file names
    name=$(basename "$1")
    names=("$name")
    # Vicuna's size and version stand the other way round in the zoo.
    [[ ! $name =~ ^vicuna-(v[0-9.]+)-(.+)$ ]] || names+=("vicuna-${BASH_REMATCH[2]}-${BASH_REMATCH[1]}")
    for name in "${names[@]}"; do
        for file in "${home}modelzoo/llm-awq/"{"${names[0]%-*}/",}"$name-w$2-g$3.pt"; do
            [ ! -f "$file" ] || { echo "$file"; return; }
        done
    done
}

choose_recipe() { # METHOD BITS MODEL_DIRECTORY: sets `recipe`, the options of that method; BITS 16 is of no weights
    local group file
    recipe=(--recipe "$1" ${GROUP_SIZE:+--group-size "$GROUP_SIZE"})
    case "$1:$2" in
        fp16:16 | rotate:16 | smooth:16 | kv[0-9]:16 | turboquant-*:16) ;;
        *:16) fail "BITS 16 is full precision, METHOD '$1' is not; give the bits of its weights, such as 3, or fp16 16" ;;
        fp16:* | rotate:* | smooth:* | kv[0-9]:* | turboquant-*:*) fail "METHOD '$1' has weights in full precision, but BITS is '$2'; give 16" ;;
        *) recipe+=(--bits "$2") ;;
    esac
    case $1 in awq*) ;; *) return ;; esac
    group=${GROUP_SIZE:-$(python -c 'import sys
from corpora.catalog import model_defaults
print(model_defaults(sys.argv[1]).default_group_size)' "$3")}
    file=$(zoo_file "$3" "$2" "$group")
    if [ -n "$file" ] && [ "${#calibration[@]}" -gt 0 ]; then
        echo "AWQ: $file is there, but CALIBRATION… asks for a search of its own: the file is not used" >&2
    elif [ -n "$file" ]; then
        echo "AWQ: scales and clip limits are those of $file, nothing is searched" >&2
        recipe+=(--set "weights.file=$file")
    fi
}

read_kv() { # METHOD KV_BITS: sets `kv`, the options of the cache, by the policy KV; 16 bits are full precision
    kv=()
    case "$1:$2" in
        kv[0-9]:16 | turboquant-*:16) fail "METHOD '$1' rounds the KV cache, but KV_BITS is 16; give the method fp16, or the bits" ;;
        *:16) [ -z "${KV:-}" ] || fail "KV='$KV' rounds the KV cache, but KV_BITS is 16; give its bits, or unset KV" ;;
        *) kv=(${KV:+--kv "$KV"} ${2:+--kv-bits "$2"}) ;; # a file says its bits itself
    esac
    case "$1:$2" in
        :16 | quarot:16 | quarot-rtn:16 | *-w4a4kv4*:16 | *-w4a8kv4*:16 | *-qllm:16 | omniquant-w[46]a*:16) kv=(--kv none) ;;
    esac
}

calibration=( # what the environment says of the text that methods calibrate on
    ${CALIBRATION:+--calibration "$CALIBRATION"}
    ${CALIBRATION_SAMPLES:+--calibration-samples "$CALIBRATION_SAMPLES"}
    ${CALIBRATION_LENGTH:+--calibration-length "$CALIBRATION_LENGTH"}
    ${SEED:+--seed "$SEED"}
)
words options OPTIONS

calibrates() { # a recipe's options: whether it looks at text
    local part='(weights|transforms?|activations|attention|kv_cache|tuning)' cache='(static|clipped|kvquant)'
    [[ ! " $* " =~ (--${part}[\ =]|[\ =]${part}=|--kv[\ =]$cache\ ) ]] || return 0 # the program knows, and says so
    case " $* " in
        *" weights.file="*) return 1 ;;
        *" activations.static=true "* | *" weights.weighted=true "* | *"-lkd "*) ;;
        *" --recipe fp16 "* | *" --recipe rotate "* | *" --recipe kv"* | *" --recipe quarot-rtn "*) return 1 ;;
        *" --recipe turboquant"*) return 1 ;;
        *" --recipe rtn"* | *" --recipe bcq"* | *" --recipe zeroquant"*) return 1 ;;
        *" --recipe "*) ;;
        *) return 1 ;;
    esac
}

choose_text() { # a recipe's options: sets `text` and `behind`, what the environment says of its calibration
    text=("${calibration[@]}") behind=${BEHIND:-}
    ! calibrates "$@" || return 0
    local name=" $*"
    name=${name#* --recipe } name=${name%% *}
    if [[ " $* " = *" --recipe "* && $name != fp16 ]]; then # nobody expects it of full precision
        [ "${#text[@]}" -eq 0 ] || echo "CALIBRATION… and SEED do not reach $name: it looks at no text" >&2
        [ -z "$behind" ] || echo "BEHIND does not reach $name: it looks at no text" >&2
    fi
    text=() behind=
}

choose_method() { # METHOD BITS MODEL_DIRECTORY [KV_BITS]: sets `method`, all options of what is run once, without arms
    # METHOD may be empty: the model as it is. Whoever gives KV_BITS, empty or not, runs with the cache that KV names.
    recipe=() kv=()
    [ -z "$1" ] || choose_recipe "${@:1:3}"
    [ $# -lt 4 ] || read_kv "$1" "$4"
    choose_text "${recipe[@]}" "${kv[@]}" "${options[@]}"
    method=("${recipe[@]}" "${kv[@]}" "${options[@]}" "${text[@]}")
}

# Devices --------------------------------------------------------------------------------------------------------------

check_device() { # DEVICE: fail unless it is spelled as `run_eval` takes it
    local index='(0|[1-9][0-9]{0,2})' twice
    [[ $1 =~ ^(cpu|all|$index(,$index)*)$ ]] ||
        fail "device '$1' is not known; give cpu, a GPU index such as 0, several: 0,1, or all"
    twice=$(tr , '\n' <<< "$1" | sort | uniq -d)
    [ -z "$twice" ] || fail "device '$1' names a GPU twice; give every index once"
}

need_gpu() { # INDEX: fail unless this machine shows a GPU of that index
    local count
    count=$(python -c 'import torch; print(torch.cuda.device_count())')
    [ "$1" -lt "$count" ] || fail "GPU index $1 is not there: this machine shows $count CUDA GPUs; choose another or cpu"
}

device_option() { # DEVICE: cpu or one GPU index, as the programs' --device spells it
    case "$1" in
        cpu) echo cpu ;;
        all) fail "device 'all' spreads a model that is evaluated; to quantize, train or draw give cpu or a GPU index" ;;
        *[!0-9]* | "" | 0?* | ????*) fail "device '$1' is not known; give cpu or a GPU index such as 0" ;;
        *) need_gpu "$1" && echo "cuda:$1" ;;
    esac
}

visible_gpus() { # DEVICE of several indices: sets `visible`, its GPUs as CUDA_VISIBLE_DEVICES spells them
    local gpu all index
    visible=$1
    for gpu in ${1//,/ }; do need_gpu "$gpu"; done
    [ -n "${CUDA_VISIBLE_DEVICES:-}" ] || return 0
    IFS=, read -ra all <<< "$CUDA_VISIBLE_DEVICES"
    visible=
    for index in ${1//,/ }; do
        [ -n "${all[$index]:-}" ] || fail "GPU index $index is not among CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"
        visible+="${visible:+,}${all[$index]}"
    done
}

run_eval() { # DEVICE PORT, then the arguments of `python -m eval`
    # DEVICE: cpu, one GPU index, or several joined by commas, which share the work; indices count within
    # CUDA_VISIBLE_DEVICES if that is set. all: one model over all GPUs.
    local device=$1 port=$2
    shift 2
    check_device "$device"
    [[ $port =~ ^[1-9][0-9]{0,4}$ && $port -le 65535 ]] || fail "PORT '$port' is no port; give 1 to 65535, such as 29500"
    [ -z "${MAX_MEMORY:-}" ] || [ "$device" = all ] || fail "MAX_MEMORY is of DEVICE all, but DEVICE is '$device'"
    case "$device" in
        cpu) python -m eval "$@" --device cpu ;;
        all) python -m eval "$@" --device cuda:all ${MAX_MEMORY:+--max-memory "$MAX_MEMORY"} ;;
        *,*)
            visible_gpus "$device"
            local commas=${device//[!,]/}
            CUDA_VISIBLE_DEVICES=$visible accelerate launch --multi_gpu --num_processes $((${#commas} + 1)) \
                --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port "$port" -m eval "$@"
            ;;
        *) python -m eval "$@" --device "cuda:$device" ;;
    esac
}

# What is run and how it is measured -----------------------------------------------------------------------------------

quantize() { # DEVICE MODEL_DIRECTORY, then a recipe's options; BEHIND=bos calibrates behind that prefix
    local device
    device=$(device_option "$1")
    choose_text "${@:3}" "${options[@]}"
    python -m quantization --model "$2" --device "$device" "${@:3}" "${options[@]}" "${text[@]}" \
        ${behind:+--calibrate-behind-prefix --prefix "$behind"}
}

# Published tables -----------------------------------------------------------------------------------------------------

table_call() { # USAGE "$@": sets `device` and `model`, the first two arguments, and goes to the checkout
    local all wanted=2
    read -ra all <<< "$1"
    case $1 in
        *…) wanted="at least 2" all=("$@") ;;
        *]) wanted="2 or 3" ;;
    esac
    [ $# -gt 2 ] && [ $# -le $((${#all[@]} + 1)) ] ||
        fail "usage: $(basename "$0") $1 (got $(($# - 1)) of $wanted arguments)"
    device=$2 model=$(model_path "$3")
    enter_project
}

reproduce() ( # TABLE…, then options of `python -m eval reproduce`; the environment says the rest, by the options' names
    check_device "$device"
    case $device in
        cpu) on=cpu ;;
        all) on=cuda:all ;;
        *) visible_gpus "$device" && on=cuda && export CUDA_VISIBLE_DEVICES=$visible ;;
    esac
    [ -z "${BEHIND:-}" ] || [ "$BEHIND" = bos ] || fail "BEHIND='$BEHIND' is not allowed; give bos, or ask eval.sh"
    given=(${BEHIND:+--behind})
    for name in MAX_MEMORY WORKERS PROTOCOL CORPUS WINDOW LIMIT TASKS MMLU_PROTOCOL DATA FEWSHOT BATCH_SIZE \
        CALIBRATION CALIBRATION_SAMPLES CALIBRATION_LENGTH OPTIONS; do
        option=${name,,}
        [ -z "${!name:-}" ] || given+=("--${option//_/-}=${!name//$'\n'/ }")
    done
    seeds=${SEEDS:-${SEED:-}}
    python -m eval reproduce "$@" --model "$model" --device "$on" "${given[@]}" ${seeds:+--seeds $seeds}
)

rows() { # METHOD BITS [GRID]: sets `only`, which chooses rows of a table: the method's and those BESIDE names, at BITS
    local method widths
    words widths BITS "$2"
    widths=("${widths[@]/%/ bits${3:-}}") only=(--only)
    for method in $1 ${BESIDE:-}; do
        case $method in
            full) only+=("16 bits") ;;
            *) only+=("${widths[@]/#/$method, }") ;;
        esac
    done
}

intactkv_table() { # NUMBER DEVICE MODEL_PATH [METHOD]…: full precision and weights of 3 bits, both arms
    table_call "DEVICE MODEL_PATH [METHOD]…" "${@:2}"
    local BEHIND='' file more=(${EPOCHS:+--set "omniquant:weights.epochs=$EPOCHS"}) # there is no arm behind
    file=$(zoo_file "$model" 3 128)
    if [ -n "$file" ] && [ "${#calibration[@]}" -eq 0 ] && [ -z "${SEEDS:-}" ]; then
        echo "AWQ: scales and clip limits are those of $file, nothing is searched" >&2
        more+=(--set "awq:weights.file=$file")
    fi
    reproduce "intactkv-$1" ${4:+--only fp16 "${@:4}"} "${more[@]}"
}
