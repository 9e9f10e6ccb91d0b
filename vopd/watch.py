"""The terminal's side of a run: starts the training process, draws its progress, measures its memory.

The libraries' output goes to log.txt in the run folder; what a person wants to see comes as progress.jsonl.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
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

LOOK_SECONDS = 0.5
MEMORY_SECONDS = 20.0  # a look costs half a second of a slow core
GRACE_SECONDS = 20.0
GIB = 1024**3


@dataclass
class Outcome:
    """How the training process ended."""

    code: int
    seconds: float
    start_up_seconds: float
    peak_memory_gib: float


def run(command: list[str], run_dir: Path, env: dict[str, str], cwd: Path, console: Console) -> Outcome:
    """Run `command` to its end. Ctrl-C asks it to keep what it has and end; a second one stops the whole process tree.

    Raises:
        KeyboardInterrupt: it was interrupted, and has ended.
    """
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
        )
    drawing = _Drawing(console)
    peak, looked, first_step = 0.0, 0.0, 0.0
    tree: list[psutil.Process] = []
    events, asked = _Events(progress_file, child), False
    while True:
        try:
            with drawing.progress:
                for event in events:
                    if event is not None:
                        drawing.show(event)
                        if event["kind"] == "step" and not first_step:
                            first_step = time.monotonic() - begin
                    elif time.monotonic() - looked > MEMORY_SECONDS:
                        looked = time.monotonic()
                        tree = _tree(child.pid)
                        peak = max(peak, sum(map(_memory, tree)) / GIB)
            break
        except KeyboardInterrupt:
            if asked:
                _stop(child, tree)
                raise
            asked = True
            console.print("stopping after a checkpoint; once more (Ctrl-C) stops at once", soft_wrap=True)
            child.send_signal(signal.SIGTERM)
    _stop(child, tree)
    if asked:
        raise KeyboardInterrupt
    return Outcome(child.returncode, time.monotonic() - begin, first_step, peak)


def python(*words: str) -> list[str]:
    """A command of this interpreter that cannot be shadowed by files in the current folder."""
    return [sys.executable, "-P", *words]


class _Events:
    """Events as they are written; None where there is nothing new. Ends after the process has ended.

    Iterating anew, after an interruption, goes on behind the last event.
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
    """One progress bar at a time, with a line for what is going on."""

    def __init__(self, console: Console) -> None:
        columns = [
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[shown]}", markup=False),
        ]  # fmt: skip
        self.progress = Progress(*columns, console=console, refresh_per_second=2)
        self.tasks: dict[str, Any] = {}

    def show(self, event: dict[str, Any]) -> None:
        if event["kind"] == "note":
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
