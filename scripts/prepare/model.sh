#!/usr/bin/env bash
# Put a model into modelzoo/FAMILY/FAMILY-SIZE. Usage: model.sh FAMILY SIZE   (model.sh smollm2 135m needs no hub)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
family=${1:?usage: model.sh FAMILY SIZE}
size=${2:?usage: model.sh FAMILY SIZE}
bash scripts/setup.sh
.venv/bin/python -m corpora prepare model "$family" "$size"
