#!/usr/bin/env bash
# Make .venv and install what the project needs. Usage: setup.sh [dev|oldest]
# oldest: .venv-oldest, with the oldest releases that work (requirements-oldest.txt), for test.sh --oldest.
# Runs again in a moment when nothing changed. PYTHON=/path/to/python3.11 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv files=(requirements.txt requirements-dev.txt) requirements=requirements.txt
case "${1:-}" in
    dev) requirements="requirements-dev.txt" ;;
    oldest) venv=.venv-oldest files+=(requirements-oldest.txt) requirements=requirements-oldest.txt ;;
    "") ;;
    *)
        echo "error: usage: setup.sh [dev|oldest] (got '$1')" >&2
        exit 2
        ;;
esac

python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
fi
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: Python 3.11 or newer is needed; found ${python:-$(python3 --version 2>&1 || echo none)}." \
        "Install it, or name one: PYTHON=/path/to/python3.11 bash scripts/setup.sh" >&2
    exit 2
fi
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    echo "error: $python has no venv module; on Debian or Ubuntu: apt-get install python3-venv" >&2
    exit 2
fi

# The stamp holds the hash of what was installed; a development install contains the plain one.
wanted=$(cat "${files[@]}" | sha256sum | cut -d' ' -f1)
stamp=$venv/installed
have=$(cat "$stamp" 2>/dev/null || true)
case "$have" in "$wanted dev" | "$wanted ${1:-run}") exit 0 ;; esac

if [ ! -x $venv/bin/python ] || ! $venv/bin/python -c '' 2>/dev/null; then
    "$python" -m venv --clear $venv
fi
echo "installing $requirements into $venv (a few minutes the first time; torch brings its CUDA libraries)" >&2
others() { # what is developed with, less the packages that the oldest requirements pin; of no other install
    [ $venv = .venv ] || grep -hvE "^-r|^($(sed -n 's/==.*//p' $requirements | paste -sd'|'))==" "${files[@]:0:2}"
}
$venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements" -r <(others)
echo "$wanted ${1:-run}" > "$stamp"
