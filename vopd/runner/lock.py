"""A run folder belongs to one run at a time: `lock` in it, held (flock) until the last process of the run is gone.

The file says who holds it. The training process inherits it, so that a start right after a killed terminal does not
meet the old trainer. What an earlier start left behind is ended before anything begins.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from vopd.common import files, processes
from vopd.errors import UserError

NAME = "lock"
TRAINER = "vopd.backbone.launch"
TERMINAL = "run"  # the command, of `vopd` or `python -m vopd`
PATIENCE_SECONDS = 15.0
NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)


@contextlib.contextmanager
def held(folder: Path, say: Callable[[str], Any]) -> Iterator[int | None]:
    """The folder is this process's within the block.

    Args:
        folder: of the run; it is there.
        say: is given what the user should know: leftovers that were ended, a file system without locks.

    Yields:
        The descriptor that holds the lock, to be inherited by the run's processes; None without locks.

    Raises:
        UserError: another run has the folder (names its pid and host), or nothing can be written there.
    """
    try:
        descriptor, locked = _acquire(folder)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be used for a run ({error.strerror}); give another run_dir."
        ) from error
    try:
        if not locked:
            say(f"{folder} is on a file system without locks: do not start a second run there")
        _end_leftovers(folder, say)
        with contextlib.suppress(OSError):
            files.remove_left(folder)
        yield descriptor if locked else None
    finally:
        with contextlib.suppress(OSError):
            (folder / NAME).unlink()
        os.close(descriptor)


def _acquire(folder: Path) -> tuple[int, bool]:
    """A descriptor of the lock file, and whether it is locked."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            _judge_holder(folder, end)
            time.sleep(0.1)
            continue
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
            return descriptor, False
        if _is(descriptor, folder / NAME):  # and not a file that its last holder has removed meanwhile
            os.ftruncate(descriptor, 0)
            who = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            }
            os.write(descriptor, json.dumps(who).encode())
            return descriptor, True
        os.close(descriptor)


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _judge_holder(folder: Path, end: float) -> None:
    """Refuse where the holder lives. One that was killed has processes that are about to be ended, by us if need be."""
    try:
        who = json.loads((folder / NAME).read_text())
        pid, host, since = int(who["pid"]), str(who["host"]), str(who["since"])
    except (OSError, ValueError, KeyError, TypeError):  # not written yet
        pid, host, since = 0, socket.gethostname(), "a moment ago"
    dead = pid and host == socket.gethostname() and not psutil.pid_exists(pid)
    if dead and time.monotonic() < end - PATIENCE_SECONDS / 2:
        return
    if dead and time.monotonic() < end:
        processes.end(processes.Marked(folder).look())
        return
    if pid or time.monotonic() > end:
        raise UserError(
            f"{folder}: a run is under way there (pid {pid} on {host}, since {since}); wait for it, or give another "
            "run_dir."
        )


def _end_leftovers(folder: Path, say: Callable[[str], Any]) -> None:
    """End what an earlier start in this folder has left on this machine."""
    left = processes.Marked(folder).look()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            arguments = process.cmdline()
            if (
                TRAINER not in arguments
                or Path(arguments[-1]).resolve() != folder.resolve()
                or process in left
            ):
                continue
            parent = process.parent()
            if parent and TERMINAL in parent.cmdline():
                raise UserError(
                    f"{folder}: a run is under way there (pid {parent.pid} on {socket.gethostname()}); wait for it, or "
                    "give another run_dir."
                )
            left += [process, *process.children(recursive=True)]
    if left:
        processes.end(left)
        pids = ", ".join(str(process.pid) for process in left)
        say(f"ended processes that an earlier start had left running in {folder} (pid {pids})")
