#!/usr/bin/env bash
# Everything that must hold: lint, format, types, and the whole test suite with the real model.
# Usage: test.sh [PYTEST ARGUMENT]…      for example: test.sh -m "not slow" tests/test_grids.py
#        test.sh --oldest [PYTEST ARGUMENT]…      the suite's fast part, with the oldest torch and transformers
# Without arguments everything runs, in two processes; tests that were named run in one, which starts sooner.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset INTACTKV_ROOT # the tests read what lies in the checkout
bash scripts/setup.sh dev
bash scripts/prepare/model.sh smollm2 135m
bash scripts/prepare/data.sh sample
bash scripts/prepare/data.sh sample-tasks
export HF_HUB_OFFLINE=1
if [ "${1:-}" = --oldest ]; then
    bash scripts/setup.sh oldest
    shift
    [ $# -gt 0 ] || set -- -n 2 --dist worksteal
    exec .venv-oldest/bin/python -m pytest -m "not slow" "$@"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
[ $# -gt 0 ] || set -- -n 2 --dist worksteal
.venv/bin/python -m pytest "$@"
