#!/usr/bin/env bash
# Grade answers to MT-bench's questions. The key of an endpoint is read from OPENAI_API_KEY.
# Usage: judge.sh JUDGE FILE…      for example: judge.sh gpt-4-0125-preview outputs/mt_bench/model_answer/*.jsonl
#   JUDGE  a model's name at the endpoint, or local:DIR for a local checkpoint
# Environment: BASE_URL of another OpenAI-compatible endpoint, BASELINE (a file of answers to compare with), CONCURRENCY
# calls at once, MAX_TOKENS of a judgement, MTBENCH_QUESTIONS=mt_bench|sample|FILE, REFERENCES=FILE (default: those of
# the judge's name, or the only ones there are), PLOT=FILE.png, PRICE_IN and PRICE_OUT (USD per million tokens).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -ge 2 ] || fail "usage: judge.sh JUDGE FILE… (got $# of at least 2 arguments)"
judge=$1 answers=()
for file in "${@:2}"; do answers+=("$(realpath -m "$file")"); done
[ -z "${BASELINE:-}" ] || BASELINE=$(realpath -m "$BASELINE")
[ -z "${REFERENCES:-}" ] || REFERENCES=$(realpath -m "$REFERENCES")
[ -z "${PLOT:-}" ] || PLOT=$(realpath -m "$PLOT")
case $judge in local:*) judge=local:$(model_path "${judge#local:}") ;; esac
enter_project
python -m eval judge --judge-model "$judge" --answers "${answers[@]}" ${BASE_URL:+--base-url "$BASE_URL"} \
    ${BASELINE:+--baseline "$BASELINE"} ${CONCURRENCY:+--concurrency "$CONCURRENCY"} \
    ${MAX_TOKENS:+--max-tokens "$MAX_TOKENS"} ${MTBENCH_QUESTIONS:+--questions "$MTBENCH_QUESTIONS"} \
    ${REFERENCES:+--references "$REFERENCES"} ${PLOT:+--plot "$PLOT"} \
    ${PRICE_IN:+--price-in "$PRICE_IN"} ${PRICE_OUT:+--price-out "$PRICE_OUT"}
