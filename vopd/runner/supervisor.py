"""The terminal's side of a run: starts the training process, draws its progress, measures its memory.

The libraries' output goes to log.txt in the run folder; what the user wants to see comes as progress.jsonl.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vopd.backbone.progress import FILE
from vopd.common import heartbeat, processes
from vopd.common.failures import LOST, Failure, ended, received
from vopd.runner.monitor import Monitor

LOOK_SECONDS = 0.5
MEMORY_SECONDS = 20.0  # a look costs half a second of a slow core
GRACE_SECONDS = 20.0
GIB = 1024**3
FULL_BYTES = 1 << 16
TURNING = ("note", "ending", "done")
CRASHES = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
"""What ends the driver itself. Of others (Ray aborts it where its own daemons are gone) it is not the first cause."""


@dataclass
class Outcome:
    """How the training process ended."""

    code: int
    seconds: float
    start_up_seconds: float
    peak_memory_gib: float
    failure: Failure | None = None
    """Why the code is not 0."""


def run(
    command: list[str],
    run_dir: Path,
    env: dict[str, str],
    cwd: Path,
    console: Console,
    lock: int | None = None,
    tell: Callable[[Failure], None] = lambda _: None,
) -> Outcome:
    """Run `command` to its end. Ctrl-C asks it to keep what it has and end; a second one stops the whole process tree.

    Processes that are gone, stopped or stuck are reported as `monitor` finds them. lock: the descriptor of the run
    folder's lock, which the run's processes hold too. tell: is called once with the failure of a run that fails, as
    soon as it is known; what was started is still ended then.

    Raises:
        KeyboardInterrupt: it was interrupted, and has ended.
    """
    teller = _Teller(tell)
    with _kept(run_dir, lock):
        outcome = _run(command, run_dir, env | processes.mark(run_dir), cwd, console, lock, teller)
        if outcome.failure:
            teller(outcome.failure)
    return outcome


class _Teller:
    """Tells once."""

    def __init__(self, tell: Callable[[Failure], None]) -> None:
        self.tell, self.told = tell, False

    def __call__(self, failure: Failure) -> None:
        if not self.told:
            self.told = True
            self.tell(failure)


def _run(
    command: list[str],
    run_dir: Path,
    env: dict[str, str],
    cwd: Path,
    console: Console,
    lock: int | None,
    tell: _Teller,
) -> Outcome:
    begin = time.monotonic()
    progress_file = run_dir / FILE
    progress_file.unlink(missing_ok=True)
    with open(run_dir / "log.txt", "ab") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
            cwd=cwd,
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
        )
    drawing, monitor = _Drawing(console), Monitor(run_dir, child.pid)
    peak, looked, first_step = 0.0, 0.0, 0.0
    tree: list[psutil.Process] = []
    events, asked = _Events(progress_file, child), False
    while True:
        try:
            with drawing.progress:
                for event in events:
                    if event is not None:
                        monitor.event(event)
                        drawing.show(event)
                        if event["kind"] == "step" and not first_step:
                            first_step = time.monotonic() - begin
                        continue
                    for notice in monitor.look():
                        drawing.progress.console.print(notice, soft_wrap=True)
                    if known := received(run_dir):
                        tell(_better(known, monitor))
                    if lost := monitor.lost():
                        if not monitor.done:
                            tell(_better(received(run_dir) or lost, monitor))
                        os.killpg(child.pid, signal.SIGKILL)
                        child.wait()
                    elif time.monotonic() - looked > MEMORY_SECONDS:
                        looked = time.monotonic()
                        tree = _tree(child.pid)
                        peak = max(peak, sum(map(_memory, tree)) / GIB)
            break
        except KeyboardInterrupt:
            if asked:  # at once: what is not saved is lost, and nothing is waited for
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                raise
            asked = True
            console.print("stopping after a checkpoint; a second Ctrl-C stops at once", soft_wrap=True)
            child.send_signal(signal.SIGTERM)
    _stop(child, tree)
    failure = _failure(child, run_dir, monitor)
    if asked:
        if known := received(run_dir):
            tell(known)
        raise KeyboardInterrupt
    code = failure.code if failure else 0
    return Outcome(code, time.monotonic() - begin, first_step, peak, failure)


@contextmanager
def _kept(run_dir: Path, lock: int | None) -> Iterator[None]:
    """Within the block a reaper waits for this process to die; at the end of either, what is left of the run goes."""
    shutil.rmtree(run_dir / heartbeat.FOLDER, ignore_errors=True)
    shutil.rmtree(run_dir / heartbeat.STACKS, ignore_errors=True)
    (run_dir / heartbeat.FOLDER).mkdir(parents=True)
    ((name, value),) = processes.mark(run_dir).items()
    reaper = processes.reaper(f"{name}={value}", () if lock is None else (lock,))
    try:
        yield
    finally:
        reaper.communicate()
        processes.end(processes.Marked(run_dir).look())  # in case the reaper was killed
        shutil.rmtree(run_dir / heartbeat.FOLDER, ignore_errors=True)
        for file in (run_dir / heartbeat.STACKS).glob("*"):
            if not file.stat().st_size:
                file.unlink()
        if (run_dir / heartbeat.STACKS).is_dir() and not any((run_dir / heartbeat.STACKS).iterdir()):
            (run_dir / heartbeat.STACKS).rmdir()


def _failure(child: subprocess.Popen[bytes], run_dir: Path, monitor: Monitor) -> Failure | None:
    """Why the training process did not do all that it should; None if it did.

    It tells in failure.json what it knows; where it could not, the process table has to do.
    """
    code, told = child.returncode, received(run_dir)
    if code == 0 or (monitor.done and told is None):
        return None
    if told:
        return _better(told, monitor)
    driver = ended(code, f"driver (pid {child.pid})", monitor.kills())
    if -code in CRASHES and not monitor.lost():  # else it was ended from here
        return driver
    if shutil.disk_usage(run_dir).free < FULL_BYTES:  # so it could not report that itself
        driver = Failure(
            f"no space is left on the disk of {run_dir}; make room and run the same command again"
        )
    return monitor.death() or monitor.lost() or driver


def _better(told: Failure, monitor: Monitor) -> Failure:
    """Where the driver only says that a process was gone, the process table knows which one was the first."""
    return (monitor.death() or told) if told.kind == LOST else told


def python(*arguments: str) -> list[str]:
    """A command of this interpreter that cannot be shadowed by files in the current folder."""
    return [sys.executable, "-P", *arguments]


class _Events:
    """Events as they are written; None where there is nothing new. Ends after the process has ended.

    Iterating again, after an interruption, continues after the last event.
    """

    def __init__(self, file: Path, child: subprocess.Popen[bytes]) -> None:
        self.file, self.child, self.position = file, child, 0

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        while True:
            ended = self.child.poll() is not None
            if self.file.exists():
                with open(self.file) as stream:
                    stream.seek(self.position)
                    while (line := stream.readline()).endswith("\n"):
                        self.position = stream.tell()
                        yield json.loads(line)
            if ended:
                return
            yield None
            time.sleep(LOOK_SECONDS)


class _Drawing:
    """One progress bar at a time, with a line for what is under way."""

    def __init__(self, console: Console) -> None:
        columns = [
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[shown]}", markup=False),
        ]  # fmt: skip
        self.progress = Progress(*columns, console=console, refresh_per_second=2)
        self.tasks: dict[str, Any] = {}

    def show(self, event: dict[str, Any]) -> None:
        if event["kind"] in TURNING:
            if "text" in event:
                self.progress.console.print(event["text"], style="dim")
            return
        name = event["name"] if event["kind"] != "evaluation" else f"answering ({event['name']})"
        if name not in self.tasks:
            self.tasks[name] = self.progress.add_task(name, total=event["total"], shown="")
        numbers = {k: v for k, v in event.items() if isinstance(v, float)}
        shown = "  ".join(f"{k} {v:.3g}" for k, v in numbers.items())
        self.progress.update(self.tasks[name], completed=event["done"], shown=shown)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _memory(process: psutil.Process) -> float:
    """Proportional set size: memory shared by several processes counts once over the tree."""
    try:
        return float(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
        return 0.0


def _stop(child: subprocess.Popen[bytes], tree: list[psutil.Process]) -> None:
    """End the process and whatever it left behind (Ray's daemons outlive a killed driver)."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    for process in tree:
        if process.pid != child.pid and process.is_running():
            process.kill()
