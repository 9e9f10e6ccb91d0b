#!/usr/bin/env bash
# Runs a recipe from a bare clone: bash scripts/run_recipe.sh NAME|PATH [key=value ...]; --help lists the keys.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
# Some systems forbid Python to keep compiled modules; every start would then compile the libraries for a minute.
unset PYTHONDONTWRITEBYTECODE
exec "$root/.venv/bin/vopd" run "$@"
