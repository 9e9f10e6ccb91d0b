#!/usr/bin/env bash
# Checks kernels and stack on this machine's GPU in at most 8 minutes: bash scripts/gpu_check.sh [--device cpu] [--out FILE]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
# Some systems forbid Python to keep compiled modules; every start would then compile the libraries for a minute.
unset PYTHONDONTWRITEBYTECODE
cd "$root"
exec .venv/bin/python -m benchmarks.gpu_check "$@"
