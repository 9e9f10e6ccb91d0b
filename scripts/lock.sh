#!/usr/bin/env bash
# Renews requirements/{cpu,gpu}.lock from pyproject.toml: the exact version of every package with the sha256
# of its files (so it serves Python 3.11 and 3.12), for Linux on x86-64, without index addresses. Versions in
# a lock stay as they are unless pyproject.toml moves them; `--upgrade` or `--upgrade-package NAME` moves more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for kind in cpu gpu; do
    echo "Resolving requirements/$kind.lock"
    "${UV:-.venv/bin/uv}" pip compile pyproject.toml --extra "$kind" --extra dev \
        --python-platform x86_64-manylinux_2_28 --python-version 3.11 --generate-hashes --no-annotate --quiet \
        --custom-compile-command "bash scripts/lock.sh" \
        --output-file "requirements/$kind.lock" "$@"
done
