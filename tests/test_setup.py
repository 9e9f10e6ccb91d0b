"""The set-up script on bare and broken machines: one sentence and exit code 2, and no work where none is due."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = (
    "awk",
    "bash",
    "cat",
    "cp",
    "cut",
    "df",
    "dirname",
    "flock",
    "grep",
    "mkdir",
    "rm",
    "sha256sum",
    "uname",
)


@pytest.fixture
def clone(tmp_path):
    """A folder with what the script reads, and no .venv."""
    folder = tmp_path / "clone"
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "setup.sh", folder / "scripts")
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.fixture
def path(tmp_path):
    """A PATH without any Python: only the tools the script names."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found, tool
        (folder / tool).symlink_to(found)
    return folder


def command(path: Path, name: str, body: str) -> None:
    (path / name).write_text(f"#!/bin/sh\n{body}\n")
    (path / name).chmod(0o755)


def setup(clone: Path, path: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(path / "bash"), "scripts/setup.sh"],
        cwd=clone,
        env={"PATH": str(path), "HOME": str(clone), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def refused(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2, done
    assert done.stderr.startswith("setup: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_no_python(clone, path):
    assert "no Python 3.11 or 3.12" in refused(setup(clone, path))


def test_shims_and_other_versions_do_not_count(clone, path):
    command(path, "python3.11", "echo 'shim: command not found' >&2; exit 127")
    command(path, "python3", "exit 1")  # what our test of the version answers for any other version
    assert "no Python 3.11 or 3.12" in refused(setup(clone, path))


def test_too_little_disk(clone, path):
    command(path, "python3.12", f'exec "{sys.executable}" "$@"')
    (path / "df").unlink()
    command(path, "df", r"printf 'Filesystem blocks used available\n/dev/x 9 9 2000000\n'")
    assert "2 GB are free" in refused(setup(clone, path))
    assert not (clone / ".venv").exists()


def test_no_numa_library(clone, path):
    command(path, "python3", 'case "$*" in *libnuma*) exit 1 ;; esac')
    assert "libnuma1" in refused(setup(clone, path))
    assert not (clone / ".venv").exists()


# A Python that makes a .venv of itself and installs nothing.
OFFLINE_PYTHON = """case "$*" in
    "-m venv --clear .venv") rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip install"*) exit 1 ;;
esac"""


def test_no_package_index(clone, path):
    command(path, "python3", OFFLINE_PYTHON)
    assert "package index could not be reached" in refused(setup(clone, path))
    assert "unfinished" in (clone / ".venv" / "vopd-stamp").read_text()


def test_an_interrupted_installation_is_made_anew(clone, path):
    command(path, "python3", OFFLINE_PYTHON)
    refused(setup(clone, path))
    (clone / ".venv" / "half-installed").touch()
    refused(setup(clone, path))
    assert not (clone / ".venv" / "half-installed").exists()


def test_a_finished_environment_is_left_alone(clone, path):
    decisive = ("requirements/cpu.lock", "pyproject.toml", "scripts/setup.sh")
    digest = hashlib.sha256(b"".join((clone / name).read_bytes() for name in decisive)).hexdigest()
    (clone / ".venv" / "bin").mkdir(parents=True)
    command(clone / ".venv" / "bin", "python", "exit 1")
    (clone / ".venv" / "vopd-stamp").write_text(f"cpu {digest}\n")
    done = setup(clone, path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (clone / ".cache").exists()

    (clone / "requirements" / "cpu.lock").write_text("another\n")
    refused(setup(clone, path))
