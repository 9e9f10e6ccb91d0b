"""A run's temporary folder: everything in it goes with it, and so does what a killed run has left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from multiprocessing import shared_memory, synchronize
from pathlib import Path

import psutil
import pytest

from vopd.common import temporary
from vopd.config import ROOT
from vopd.errors import UserError

CHILD = """
import os, sys, time
from vopd.common import temporary
with temporary.scratch() as folder:
    (folder / "socket").touch()
    print(folder, flush=True)
    time.sleep(60)
"""

LAUNCHER = """
import subprocess, sys, time
from vopd.common import temporary
hold = "import sys, time, pathlib; from vopd.common import temporary; temporary.hold(pathlib.Path(sys.argv[1]))"
with temporary.scratch() as folder:
    wait = "; print(1, flush=True); time.sleep(60)"
    trainer = subprocess.Popen([sys.executable, "-c", hold + wait, str(folder)], stdout=subprocess.PIPE)
    trainer.stdout.readline()
    print(folder, trainer.pid, flush=True)
    time.sleep(60)
"""

RAY_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short temporary folder of the system's, with nothing in it."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as place:
        monkeypatch.setenv("TMPDIR", place)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(place)
    monkeypatch.setattr(tempfile, "tempdir", None)


def start(code: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | more,
    )


def test_a_folder_is_private_locked_and_gone_in_the_end(root: Path) -> None:
    with temporary.scratch() as folder:
        assert folder.parent == root and stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert temporary.environment(folder)["TMPDIR"] == str(folder)
        (folder / "deep").mkdir()
        (folder / "deep" / "file").touch()
        assert temporary.sweep() == []  # it is held
    assert list(root.iterdir()) == []


def test_an_error_takes_the_folder_along(root: Path) -> None:
    with pytest.raises(KeyboardInterrupt), temporary.scratch():
        raise KeyboardInterrupt
    assert list(root.iterdir()) == []


def test_a_killed_run_is_cleared_by_the_next_start_and_a_living_one_is_not(root: Path) -> None:
    runs = [start(CHILD), start(CHILD)]
    folders = [Path(run.stdout.readline().strip()) for run in runs]  # type: ignore[union-attr]
    assert all((folder / "socket").exists() for folder in folders)
    runs[0].send_signal(signal.SIGKILL)
    runs[0].wait()
    with temporary.scratch() as folder:
        assert set(root.iterdir()) == {folder, folders[1]}
    runs[1].send_signal(signal.SIGINT)
    runs[1].wait()
    assert list(root.iterdir()) == []


def test_folders_that_are_not_a_runs_are_left_alone(root: Path) -> None:
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "lock").touch()
    (root / "vopd-notes").mkdir()
    (root / "vopd-notes" / "mine.txt").touch()
    (root / "vopd-link").symlink_to(root / "elsewhere")
    (root / "vopd-file").touch()
    with temporary.scratch():
        pass
    assert {path.name for path in root.iterdir()} == {"elsewhere", "vopd-notes", "vopd-link", "vopd-file"}
    assert (root / "vopd-notes" / "mine.txt").exists() and (root / "elsewhere" / "lock").exists()


def test_a_run_that_still_has_a_trainer_is_not_cleared(root: Path) -> None:
    """The launcher is dead, its training process holds the folder."""
    launcher = start(LAUNCHER)
    folder, trainer = launcher.stdout.readline().split()  # type: ignore[union-attr]
    launcher.kill()
    launcher.wait()
    assert temporary.sweep() == []
    psutil.Process(int(trainer)).kill()
    deadline = time.monotonic() + 20
    while not (swept := temporary.sweep()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert swept == [Path(folder)] and list(root.iterdir()) == []


def test_processes_that_outlive_the_run_are_ended(root: Path) -> None:
    wait = "print(1, flush=True); time.sleep(60)"
    stubborn = f"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); {wait}"
    with temporary.scratch() as folder:
        left = [start(c, **temporary.environment(folder)) for c in (f"import time; {wait}", stubborn)]
        for process in left:
            process.stdout.readline()  # type: ignore[union-attr]
        assert {p.pid for p in temporary.processes(folder)} == {p.pid for p in left}
    assert not any(psutil.pid_exists(process.pid) for process in left)


def test_shared_memory_that_nobody_has_mapped_goes(root: Path) -> None:
    """What a killed process leaves: a segment and a semaphore. What is in use, or older, stays."""
    used = shared_memory.SharedMemory(create=True, size=64)
    left = temporary.SHARED_MEMORY / f"psm_{os.getpid()}_left"
    other = temporary.SHARED_MEMORY / f"other_{os.getpid()}"
    try:
        with temporary.scratch():
            time.sleep(0.01)
            made = multiprocessing.get_context("spawn").Semaphore()
            left.touch()
            other.touch()
            assert left in temporary.orphans(time.time() - 60)
            assert left not in temporary.orphans(time.time() + 60)
        assert not left.exists() and other.exists()
        assert (temporary.SHARED_MEMORY / used.name.lstrip("/")).exists()
        # A process that is started now opens it by its name.
        opener = multiprocessing.get_context("spawn").Process(
            target=synchronize.Semaphore.get_value, args=(made,)
        )
        opener.start()
        opener.join()
        assert opener.exitcode == 0
    finally:
        left.unlink(missing_ok=True)
        other.unlink(missing_ok=True)
        used.close()
        used.unlink()


def test_a_path_too_long_for_sockets_or_not_writable_is_a_sentence(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = root / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(UserError, match=r"^TMPDIR=.*too long"), temporary.scratch():
        pass
    monkeypatch.setattr(tempfile, "tempdir", str(root / "absent"))
    with pytest.raises(UserError, match=r"^TMPDIR=.*cannot be written"), temporary.scratch():
        pass


def test_the_longest_folder_is_the_longest_that_ray_takes() -> None:
    from ray._private.utils import validate_socket_filepath

    longest = "/" + "x" * (temporary.LONGEST_PATH - 1)
    validate_socket_filepath(longest + RAY_SOCKET)
    with pytest.raises(OSError, match="AF_UNIX"):
        validate_socket_filepath(longest + "x" + RAY_SOCKET)
