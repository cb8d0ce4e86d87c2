#!/usr/bin/env bash
# Put a data set into datasets/. Usage: data.sh NAME   (data.sh sample needs no hub)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
name=${1:?usage: data.sh NAME}
bash scripts/setup.sh
.venv/bin/python -m corpora prepare data "$name"
