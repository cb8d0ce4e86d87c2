#!/usr/bin/env bash
# Fetch MT-bench into fastchat/data/mt_bench/: the published questions, judge prompts and GPT-4's reference answers from
# lm-sys/FastChat, and IntactKV's own reference answers, of gpt-4-0125-preview, from one commit of ruikangliu/IntactKV.
# Usage: mtbench.sh      MTBENCH_SOURCE=URL names a mirror of FastChat's llm_judge/data, INTACTKV_SOURCE=URL one of
# IntactKV's fastchat/data. No checked hash of these files is known here: their form is checked (of IntactKV's also its
# length in that commit), and their SHA-256 printed, for you to compare.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 0 ] || fail "usage: mtbench.sh (got $# of 0 arguments)"
enter_project
commit=39fec976228ef8738c0b67681043d87c7e8d8ed5 # of IntactKV: whoever serves it, it cannot change
fastchat=${MTBENCH_SOURCE:-https://raw.githubusercontent.com/lm-sys/FastChat/main/fastchat/llm_judge/data}
intactkv=${INTACTKV_SOURCE:-https://raw.githubusercontent.com/ruikangliu/IntactKV/$commit/fastchat/data}
target=fastchat/data/mt_bench
questions=mt_bench/question.jsonl prompts=judge_prompts.jsonl
references=(mt_bench/reference_answer/gpt-4.jsonl mt_bench/reference_answer/gpt-4-0125-preview.jsonl)

fetch() { # URL FILE
    local place=$target/${2#mt_bench/} reason
    [ ! -s "$place" ] || return 0
    mkdir -p "$(dirname "$place")"
    reason=$(curl --fail --silent --show-error --location --max-time 120 --output "$place.partial" "$1/$2" 2>&1) ||
        { rm -f "$place.partial"; fail "$1/$2 could not be fetched ($reason); try again, or copy it to $place"; }
    mv "$place.partial" "$place"
}
for file in $questions "${references[0]}" $prompts; do fetch "$fastchat" "$file"; done
fetch "$intactkv" "${references[1]}"
python -c '
from pathlib import Path
from corpora.errors import UserError, run_program
from eval.mtbench.judge import read_materials
from eval.mtbench.answers import question_file, read_questions

def check():
    folder = Path("fastchat/data/mt_bench")
    questions = read_questions(question_file("mt_bench"))
    for name in ("gpt-4", "gpt-4-0125-preview"):
        file = folder / f"reference_answer/{name}.jsonl"
        found = read_materials(questions, folder / "judge_prompts.jsonl", file).references
        wanted = range(101, 131)  # math, reasoning, coding
        if missing := sorted(set(wanted) - set(found)):
            raise UserError(f"{file} has no answer to question {missing[0]}; remove it and fetch it again")
        print(f"{file}: {len(found)} reference answers, {len(file.read_text("utf-8"))} characters")
    print("of the last, the commit has 98870 characters")
    print(f"{len(questions)} questions (80 are published), judge prompts and reference answers are in {folder}")

run_program(check)'
echo "No checked hash of these files is known here; compare with a copy you trust:"
cd $target
sha256sum question.jsonl judge_prompts.jsonl reference_answer/gpt-4.jsonl reference_answer/gpt-4-0125-preview.jsonl
