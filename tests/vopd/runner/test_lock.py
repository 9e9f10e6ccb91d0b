"""A run folder is one run's at a time; what an earlier start left running there is ended first."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from vopd.common import processes
from vopd.config import ROOT
from vopd.errors import UserError
from vopd.runner import lock

HOLD = """
import sys
from pathlib import Path
from vopd.runner import lock
with lock.held(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdin and process.stdout
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def said() -> list[str]:
    """What the user was told."""
    return []


def test_a_second_start_is_refused_with_pid_and_host_by_another_path_too(
    tmp_path: Path, said: list[str]
) -> None:
    for name in ("run", "another"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with holder(tmp_path / "run") as first:
        for path in (tmp_path / "run", tmp_path / "link", tmp_path / "run" / ".." / "run"):
            with (
                pytest.raises(UserError, match=rf"pid {first.pid} on {socket.gethostname()}"),
                lock.held(path, said.append),
            ):
                pass
        with lock.held(tmp_path / "another", said.append):
            pass
    with lock.held(tmp_path / "run", said.append) as descriptor:
        assert descriptor is not None
        who = json.loads((tmp_path / "run" / lock.NAME).read_text())
        assert (who["pid"], who["host"]) == (os.getpid(), socket.gethostname())
    assert said == []


def test_a_trainer_without_a_terminal_is_ended_before_a_start(tmp_path: Path, said: list[str]) -> None:
    trainer = subprocess.Popen(SLEEP, env=os.environ | processes.mark(tmp_path))
    stranger = subprocess.Popen(SLEEP, env=os.environ | processes.mark(tmp_path / "other"))
    try:
        with lock.held(tmp_path, said.append):
            assert not psutil.pid_exists(trainer.pid)
        assert stranger.poll() is None
        assert len(said) == 1 and str(trainer.pid) in said[0]
    finally:
        for process in (trainer, stranger):
            process.kill()
            process.wait()


def test_a_trainer_of_an_older_version_is_known_by_its_command(tmp_path: Path, said: list[str]) -> None:
    old = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)", "-m", lock.TRAINER, str(tmp_path)]
    )
    try:
        with lock.held(tmp_path, said.append):
            assert not psutil.pid_exists(old.pid)
        assert str(old.pid) in said[0]
    finally:
        old.kill()
        old.wait()


def test_a_killed_holder_whose_trainer_still_holds_the_lock_is_waited_for_then_its_trainer_ended(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.6)
    script = HOLD.replace("print(\"held\", flush=True)", (
        "import subprocess, os; from vopd.common import processes\n"
        "    d = next(int(f) for f in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{f}')"
        " and os.readlink(f'/proc/self/fd/{f}').endswith('/lock'))\n"
        "    p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], pass_fds=(d,),"
        " env=os.environ | processes.mark(Path(sys.argv[1])), stdout=subprocess.DEVNULL)\n"
        "    print(p.pid, flush=True)"
    ))  # fmt: skip
    first = subprocess.Popen(
        [sys.executable, "-P", "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert first.stdout
    trainer = psutil.Process(int(first.stdout.readline()))
    first.kill()
    first.communicate()
    assert trainer.is_running()
    with lock.held(tmp_path, said.append) as descriptor:
        assert descriptor is not None
    assert not trainer.is_running() or trainer.status() == psutil.STATUS_ZOMBIE


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with lock.held(tmp_path, said.append) as descriptor:
        assert descriptor is None
    assert "without locks" in said[0]


def test_a_place_where_nothing_can_be_written_is_one_sentence(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="give another run_dir"),
        lock.held(tmp_path / "file" / "run", said.append),
    ):
        pass


def test_nothing_of_the_lock_is_left_behind(tmp_path: Path, said: list[str]) -> None:
    with pytest.raises(UserError), lock.held(tmp_path, said.append):
        raise UserError("no")
    assert list(tmp_path.iterdir()) == []
