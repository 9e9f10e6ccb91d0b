#!/usr/bin/env bash
# Runs methods over seeds and compares them: bash scripts/compare.sh [RECIPE...] [seeds=0,1,2] [key=value ...]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
# Some systems forbid Python to keep compiled modules; every start would then compile the libraries for a minute.
unset PYTHONDONTWRITEBYTECODE
exec "$root/.venv/bin/vopd" compare "$@"
