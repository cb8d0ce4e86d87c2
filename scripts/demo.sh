#!/usr/bin/env bash
# The main job on the embedded default: what quantization costs SmolLM2-135M, and what IntactKV gives back.
# Usage: demo.sh      (sets up, prepares model and text, quantizes, evaluates, prints the table, draws three figures)
# Environment: LIMIT windows of WINDOW tokens per run (default 8 of 512: fits 15 minutes on two cores).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -eq 0 ] || fail "usage: demo.sh (got $# of 0 arguments)"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
bash scripts/prepare/model.sh smollm2 135m
bash scripts/prepare/data.sh sample
export HF_HUB_OFFLINE=1
name=smollm2-135m model=${home}modelzoo/smollm2/smollm2-135m python=.venv/bin/python
window=${WINDOW:-512} limit=${LIMIT:-8}

run() { $python -m eval ppl --model "$model" --corpus sample --window "$window" --limit "$limit" "$@" > /dev/null; }
for recipe in fp16 gptq-w3 rtn-w4 rtn-w3 kv4 kv3 kv2; do
    for prefix in none bos; do
        run --recipe $recipe --prefix $prefix
    done
    [ $recipe != gptq-w3 ] || run --recipe $recipe --prefix bos --calibrate-behind-prefix
done
echo
$python -m eval table --model $name --corpus sample --protocol intactkv --window "$window" --limit "$limit"
echo
$python -m eval plot perplexity --model $name --corpus sample --protocol intactkv --window "$window" --limit "$limit" --out "${home}outputs/figures/perplexity.png"
$python -m eval plot pivots --model "$model" --out "${home}outputs/figures/pivots.png"
$python -m eval plot hessian --model "$model" --out "${home}outputs/figures/hessian.png"
