#!/usr/bin/env bash
# Runs every check: lint, format, types, unit tests, slow ones, tests with several processes, end-to-end tests.
# With arguments only pytest, with these: bash scripts/test.sh -k divergence; ... -m e2e
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
# Some systems forbid Python to keep compiled modules; every start would then compile the libraries for a minute.
unset PYTHONDONTWRITEBYTECODE

step() {
    echo "== $*"
    ".venv/bin/$1" "${@:2}"
}

if (($#)); then
    step pytest "$@"
    exit
fi
step ruff check .
step ruff format --check .
step mypy
# A file stays with one of the two workers, for the sake of what its tests share.
OMP_NUM_THREADS=1 step pytest -q -n 2 --dist loadfile
OMP_NUM_THREADS=1 step pytest -q -n 2 --dist loadfile -m slow
step pytest -q -m distributed
step pytest -q -m e2e
echo "== all checks passed in $SECONDS s"
