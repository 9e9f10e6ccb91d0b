"""A run as the terminal's process sees it, with small scripts in the place of the training process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from rich.console import Console

from vopd.common import failures, processes
from vopd.common.failures import Failure
from vopd.config import ROOT
from vopd.runner import supervisor

Start = Callable[..., supervisor.Outcome]
DAEMON = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
HEAD = (
    "import os, signal, subprocess, sys, time\nfrom pathlib import Path\nfrom vopd.common.failures import *\n"
)


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """`start(script)` runs a training process that is this script; its folder is tmp_path."""

    def started(script: str, console: Console | None = None) -> supervisor.Outcome:
        file = tmp_path / "script.py"
        file.write_text(HEAD + script)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        console = console or Console(file=StringIO())
        return supervisor.run(
            supervisor.python(str(file), str(tmp_path)), tmp_path, environment, tmp_path, console
        )

    return started


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks so often that scripts can be short."""
    monkeypatch.setattr("vopd.runner.monitor.LOOK_SECONDS", 0.1)
    monkeypatch.setattr("vopd.runner.supervisor.LOOK_SECONDS", 0.1)


def left(folder: Path) -> list[psutil.Process]:
    return processes.Marked(folder).look()


def test_a_run_that_does_all_it_should_has_no_failure_and_leaves_no_process(
    start: Start, tmp_path: Path
) -> None:
    outcome = start(DAEMON)
    assert (outcome.code, outcome.failure) == (0, None)
    assert left(tmp_path) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.txt", "script.py"]


def test_what_the_driver_says_is_what_is_told(start: Start) -> None:
    failure = Failure("the cause", 2, "UserError")
    outcome = start(f"hand_over(Path(sys.argv[1]), {failure!r}); sys.exit(2)")
    assert (outcome.code, outcome.failure) == (2, failure)


def test_it_is_told_once_and_before_the_driver_has_ended(tmp_path: Path) -> None:
    told: list[bool] = []

    def tell(failure: Failure) -> None:
        told.append(bool(left(tmp_path)))

    file = tmp_path / "script.py"
    file.write_text(HEAD + "hand_over(Path(sys.argv[1]), Failure('the cause')); time.sleep(2); sys.exit(1)")
    environment, console = os.environ | {"PYTHONPATH": str(ROOT)}, Console(file=StringIO())
    supervisor.run(
        supervisor.python(str(file), str(tmp_path)), tmp_path, environment, tmp_path, console, tell=tell
    )
    assert told == [True]


def test_a_driver_that_was_killed_is_told_with_its_signal_and_takes_all_along(
    start: Start, tmp_path: Path
) -> None:
    outcome = start(DAEMON + "os.kill(os.getpid(), signal.SIGKILL)")
    assert outcome.failure is not None and outcome.code == 1
    assert (
        "the driver (pid " in outcome.failure.sentence and "was killed by SIGKILL" in outcome.failure.sentence
    )
    assert left(tmp_path) == []


def test_a_driver_that_ends_without_an_error(start: Start) -> None:
    outcome = start("sys.exit(3)")
    assert outcome.failure is not None and "ended with code 3" in outcome.failure.sentence


def test_a_driver_that_could_not_say_why_on_a_full_disk(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    (tmp_path / failures.FAILURE).mkdir()  # nothing can be written
    outcome = start("hand_over(Path(sys.argv[1]), Failure('no space')); sys.exit(1)")
    assert outcome.failure is not None and "no space is left on the disk of" in outcome.failure.sentence


ACTOR = (
    "actor = subprocess.Popen(['/bin/bash', '-c', 'exec -a ray::ViewRolloutWorker sleep 600'])\n"
    "time.sleep(1)\nos.kill(actor.pid, signal.SIGKILL)\nactor.wait()\n"
)


@pytest.mark.parametrize(
    "rest",
    [
        "time.sleep(600)",
        "time.sleep(1); hand_over(Path(sys.argv[1]), Failure('gone', kind=LOST)); sys.exit(1)",
    ],
)
def test_a_worker_that_was_killed_ends_the_run_with_its_role(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rest: str
) -> None:
    monkeypatch.setattr("vopd.runner.monitor.PATIENCE_SECONDS", 0.5)
    outcome = start(ACTOR + rest)
    assert outcome.failure is not None and outcome.code == 1
    assert outcome.failure.sentence.startswith("the rollout worker (pid ")
    assert left(tmp_path) == []


def test_the_drivers_own_word_on_a_lost_worker_comes_first(start: Start) -> None:
    outcome = start(
        ACTOR + "hand_over(Path(sys.argv[1]), Failure('CUDA out of memory', 1, 'X')); sys.exit(1)"
    )
    assert outcome.failure is not None and outcome.failure.sentence == "CUDA out of memory"


def test_a_stopped_driver_is_reported_and_continues(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vopd.runner.monitor.STOPPED_SECONDS", 0.5)
    console = Console(file=StringIO(), width=500)
    script = (
        "subprocess.Popen(['/bin/bash', '-c', f'sleep 2; kill -CONT {os.getpid()}'])\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(1)\n"
    )
    assert start(script, console).failure is None
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "is stopped (kill -CONT" in said and "continues after" in said


TERMINAL = """
import os, sys
from pathlib import Path
from rich.console import Console
from vopd.runner import supervisor
folder = Path(sys.argv[1])
supervisor.run(supervisor.python(str(folder / "script.py"), str(folder)), folder, dict(os.environ), folder, Console())
"""


@pytest.mark.parametrize("who", ["terminal", "terminal and reaper", "group"])
def test_a_killed_terminal_takes_trainer_and_daemons_along(tmp_path: Path, who: str) -> None:
    (tmp_path / "script.py").write_text(
        HEAD + "from vopd.common.processes import die_with_parent\ndie_with_parent()\n" + DAEMON
        + "(Path(sys.argv[1]) / 'ready').touch()\ntime.sleep(600)\n"
    )  # fmt: skip
    terminal = subprocess.Popen(
        [sys.executable, "-P", "-c", TERMINAL, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while not (tmp_path / "ready").exists():
        assert terminal.poll() is None
        time.sleep(0.05)
    trainer, daemon = left(tmp_path)
    if who == "terminal and reaper":
        for child in psutil.Process(terminal.pid).children():
            if str(processes.REAPER) in child.cmdline():
                child.kill()
    os.killpg(terminal.pid, signal.SIGKILL)
    terminal.wait()
    if who == "terminal and reaper":  # the kernel ends the trainer; what it leaves is for the next start
        psutil.wait_procs([trainer], timeout=30)
        assert left(tmp_path) in ([], [daemon])
        processes.end(left(tmp_path))
    else:
        _, alive = psutil.wait_procs([trainer, daemon], timeout=30)
        assert alive == []


def test_a_failure_of_an_older_start_is_not_told_again(start: Start, tmp_path: Path) -> None:
    (tmp_path / failures.FAILURE).write_text("torn")
    outcome = start("sys.exit(1)")
    assert outcome.failure is not None and "ended with code 1" in outcome.failure.sentence
