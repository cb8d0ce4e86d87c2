#!/usr/bin/env bash
# Every figure that needs a GPU: JSON lines, a table last, and outputs/benchmarks/gpu.jsonl. All steps take
# 312 s on an H200; name some where time is short.
# Usage: gpu.sh [--steps gptq products lutgemm overhead spqr kv_decode memory walk]      (default: all)
# Needs torch, Triton and transformers, from .venv or from python3; what else is missing is left out, and that is said.
# PEER_PYTHON: an interpreter with llm-compressor (default: that of benchmarks/peers/setup.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
export HF_HUB_OFFLINE=1 PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD" TOKENIZERS_PARALLELISM=false
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: $python sees no GPU; these benchmarks are of GPUs alone" >&2
    exit 2
fi
exec "$python" -m benchmarks.gpu "$@"
