#!/usr/bin/env bash
# Make the peers' environments below .venv-peers/. Usage: setup.sh [llmcompressor|gptqmodel]   (default: both)
# Runs again in a moment when nothing changed. About 6 GB each. PYTHON=/path/to/python3.11 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}
if ! "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is not a Python 3.11 or newer with the venv module; name one: PYTHON=/path/to/python3.11" \
        "bash benchmarks/peers/setup.sh" >&2
    exit 2
fi

[ $# -gt 0 ] || set -- llmcompressor gptqmodel
for name in "$@"; do
    requirements=benchmarks/peers/requirements-$name.txt
    if [ ! -f "$requirements" ]; then
        echo "error: unknown peer $name; choose llmcompressor or gptqmodel" >&2
        exit 2
    fi
    environment=.venv-peers/$name
    # The stamp holds the hash of what was installed.
    wanted=$(sha256sum < "$requirements" | cut -d' ' -f1)
    [ "$(cat "$environment/installed" 2>/dev/null || true)" = "$wanted" ] && continue
    if [ ! -x "$environment/bin/python" ] || ! "$environment/bin/python" -c '' 2>/dev/null; then
        "$python" -m venv --clear "$environment"
    fi
    echo "installing $requirements into $environment (a few minutes; torch brings its CUDA libraries)" >&2
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    echo "$wanted" > "$environment/installed"
done
