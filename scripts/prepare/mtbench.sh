#!/usr/bin/env bash
# Fetch MT-bench's published questions, reference answers and judge prompts from lm-sys/FastChat into
# fastchat/data/mt_bench/. Usage: mtbench.sh      MTBENCH_SOURCE=URL names a mirror of FastChat's llm_judge/data
# No checked hash of these files is known here: their form is checked and their SHA-256 printed, for you to compare.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 0 ] || fail "usage: mtbench.sh (got $# of 0 arguments)"
enter_project
source_url=${MTBENCH_SOURCE:-https://raw.githubusercontent.com/lm-sys/FastChat/main/fastchat/llm_judge/data}
target=fastchat/data/mt_bench
fetched=(mt_bench/question.jsonl mt_bench/reference_answer/gpt-4.jsonl judge_prompts.jsonl)
mkdir -p "$target/reference_answer"
for file in "${fetched[@]}"; do
    place=$target/${file#mt_bench/}
    [ -s "$place" ] && continue
    reason=$(curl --fail --silent --show-error --location --max-time 120 --output "$place.partial" "$source_url/$file" 2>&1) ||
        { rm -f "$place.partial"; fail "$source_url/$file could not be fetched ($reason); try again, or copy it to $place"; }
    mv "$place.partial" "$place"
done
python -c '
from pathlib import Path
from corpora.errors import run_program
from eval.mtbench.judge import read_materials
from eval.mtbench.answers import question_file, read_questions

def check():
    folder = Path("fastchat/data/mt_bench")
    questions = read_questions(question_file("mt_bench"))
    read_materials(questions, folder / "judge_prompts.jsonl", folder / "reference_answer/gpt-4.jsonl")
    print(f"{len(questions)} questions (80 are published), judge prompts and reference answers are in {folder}")

run_program(check)'
echo "No checked hash of these files is known here; compare with a copy you trust:"
sha256sum "$target/question.jsonl" "$target/reference_answer/gpt-4.jsonl" "$target/judge_prompts.jsonl"
