"""Heartbeats of a run's processes: each writes every two seconds what it is doing, the terminal's process reads them.

`start` runs a thread that writes RUN_DIR/vitals/PID.json: when it last ran, when the process's event loop last turned
(if it has one), where the thread that called `start` is, which call of a recipe it is in, and since when. A process
that stops writing is stopped, or holds Python's lock in a call that does not come back; faulthandler, which needs no
lock, then writes the stacks of all its threads to RUN_DIR/stacks/. Times are of CLOCK_MONOTONIC, which is one for all
processes of a machine. Nothing here imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from vopd.common import files, processes

FOLDER, STACKS, ENDED = "vitals", "stacks", "ended"
BEAT_SECONDS = 2.0
SILENCE_SECONDS = 20.0
"""After so long without a heartbeat a process counts as silent."""

_calls: dict[int, tuple[str, float]] = {}  # thread -> the call of a recipe it is in, and since when


@contextlib.contextmanager
def calling(what: str) -> Iterator[None]:
    """Within the block this thread is in a call of third-party code, such as `score (FILE, line 3)`."""
    thread = threading.get_ident()
    _calls[thread] = (what, time.monotonic())
    try:
        yield
    finally:
        _calls.pop(thread, None)


def start(role: str, loop: asyncio.AbstractEventLoop | None = None) -> None:
    """Start this process's heartbeat as `role`, where it belongs to a run.

    loop: a running event loop that must keep turning.
    """
    folder = os.environ.get(processes.MARK)
    if folder and not any(thread.name == FOLDER for thread in threading.enumerate()):
        heart = _Heart(Path(folder), role, loop)
        threading.Thread(target=heart.run, name=FOLDER, daemon=True).start()


def read(folder: Path) -> dict[int, dict[str, Any]]:
    """pid -> what it last wrote, of a run folder."""
    found = {}
    for file in (folder / FOLDER).glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            found[int(file.stem)] = json.loads(file.read_text())
    return found


def note_end(folder: Path, pid: int, code: int) -> None:
    """Keep how a process ended, for `ended`; called by its parent."""
    with contextlib.suppress(OSError), (folder / FOLDER / ENDED).open("a") as file:
        file.write(f"{pid} {code}\n")


def ended(folder: Path) -> dict[int, int]:
    """pid -> exit code (negative: signal) of the processes whose parent has seen them end."""
    file = folder / FOLDER / ENDED
    lines = file.read_text().splitlines() if file.exists() else []
    return {int(pid): int(code) for pid, code in (line.split() for line in lines)}


class _Heart:
    def __init__(self, folder: Path, role: str, loop: asyncio.AbstractEventLoop | None) -> None:
        self.file = folder / FOLDER / f"{os.getpid()}.json"
        self.stacks = folder / STACKS / f"{role.replace(' ', '_')}-{os.getpid()}.txt"
        self.role, self.loop, self.turned = role, loop, time.monotonic()
        self.thread = threading.get_ident()
        self.dumped = False

    def run(self) -> None:
        """Beat until the process ends."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.stacks.parent.mkdir(parents=True, exist_ok=True)
        with self.stacks.open("w") as stacks:
            while True:
                with contextlib.suppress(OSError):  # a full disk ends no heart
                    self.beat(stacks)
                faulthandler.dump_traceback_later(SILENCE_SECONDS, file=stacks)
                time.sleep(BEAT_SECONDS)

    def beat(self, stacks: Any) -> None:
        """Write the file once; the stacks too where a call or the event loop is stuck."""
        now = time.monotonic()
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._turn)
        thread, call = min(_calls.copy().items(), key=lambda item: item[1][1], default=(self.thread, None))
        signs = {
            "role": self.role,
            "beat": now,
            "loop": self.turned if self.loop is not None else None,
            "call": call,
            "at": where(sys._current_frames().get(thread)),
        }
        files.write_text(self.file, json.dumps(signs))
        still = min(self.turned if self.loop is not None else now, call[1] if call else now)
        stuck = now - still > SILENCE_SECONDS / 2
        if stuck and not self.dumped:
            faulthandler.dump_traceback(file=stacks)
        self.dumped = stuck

    def _turn(self) -> None:
        self.turned = time.monotonic()


def where(frame: FrameType | None) -> str:
    """The innermost frame outside the libraries, `FILE, line N, in NAME`; the innermost one if there is none."""
    innermost = frame
    while frame is not None and _of_library(frame.f_code.co_filename):
        frame = frame.f_back
    chosen = frame or innermost
    return (
        f"{chosen.f_code.co_filename}, line {chosen.f_lineno}, in {chosen.f_code.co_name}" if chosen else ""
    )


def _of_library(file: str) -> bool:
    return file.startswith("<") or bool({"site-packages", "lib"} & set(Path(file).parts))
