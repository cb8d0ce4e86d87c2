#!/usr/bin/env bash
# Put a model into modelzoo/FAMILY/FAMILY-SIZE. Usage: model.sh FAMILY SIZE   (model.sh smollm2 135m needs no hub)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
[ $# -eq 2 ] || fail "usage: model.sh FAMILY SIZE (got $# of 2 arguments)"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash scripts/setup.sh
.venv/bin/python -m corpora prepare model "$1" "$2"
