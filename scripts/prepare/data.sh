#!/usr/bin/env bash
# Put a data set into datasets/. Usage: data.sh NAME   (data.sh sample needs no hub)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 1 ] || fail "usage: data.sh NAME (got $# of 1 argument)"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash scripts/setup.sh
.venv/bin/python -m corpora prepare data "$1"
