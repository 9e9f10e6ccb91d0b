"""One folder for everything temporary that a run's processes make, gone when the run is.

Ray, vLLM, torch, verl and the trackers leave sockets, locks and caches in the system's temporary folder. A run has a
folder of its own there instead, as TMPDIR of all its processes; whoever made it removes it in the end, together with
processes that outlived the run and shared memory that is no longer mapped. A folder is held by a lock as long as
a process of its run lives. One whose lock is free was left by a run that was killed: the next start removes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from vopd.errors import UserError

PREFIX = "vopd-"
LOCK = "lock"
VARIABLE = "VOPD_SCRATCH"
SHARED_MEMORY = Path("/dev/shm")
# multiprocessing's semaphores and segments, and verl's buckets of weights.
SEGMENTS = ("sem.mp-", "psm_", "verl_weights_")
# Ray makes <folder>/session_<26 characters of time>_<pid>/sockets/plasma_store, and a socket's address ends at 107.
LONGEST_PATH = 107 - len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
LONGEST_ROOT = LONGEST_PATH - len(f"/{PREFIX}12345678")
GRACE_SECONDS = 3.0


@contextmanager
def scratch() -> Iterator[Path]:
    """A new folder, its lock held by this process; removed with all that is left of its run.

    Raises:
        UserError: the system's temporary folder cannot be written, or its path is too long for sockets.
    """
    sweep()
    root = Path(tempfile.gettempdir()).absolute()
    if len(os.fsencode(root)) > LONGEST_ROOT:
        raise UserError(
            f"TMPDIR={root}: too long for the sockets of a run; use a folder of at most {LONGEST_ROOT} bytes."
        )
    try:
        # Locked before it has the name that `sweep` looks for.
        made = Path(tempfile.mkdtemp(prefix=f"new-{PREFIX}", dir=root))
        held = hold(made)
        folder = made.rename(root / made.name.removeprefix("new-"))
    except OSError as error:
        raise UserError(
            f"TMPDIR={root}: cannot be written ({error.strerror}); use another folder."
        ) from error
    try:
        yield folder
    finally:
        os.close(held)
        _clear(folder)


def environment(folder: Path) -> dict[str, str]:
    """Variables that make the processes of a run use `folder`."""
    return {
        "TMPDIR": str(folder),
        VARIABLE: str(folder),
        "WANDB_CACHE_DIR": str(folder / "wandb_cache"),
    }


def hold(folder: Path) -> int:
    """Keep `folder` from being swept until this process ends or closes the descriptor that this returns."""
    held = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(held, fcntl.LOCK_SH)
    return held


def sweep() -> list[Path]:
    """Remove this user's folders that no process holds; returns them."""
    swept = []
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # not ours, no lock in it, held, or just removed by another start
            if folder.stat(follow_symlinks=False).st_uid != os.geteuid() or folder.is_symlink():
                continue
            held = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _clear(folder)
                swept.append(folder)
            finally:
                os.close(held)
    return swept


def orphans(since: float) -> list[Path]:
    """Segments of shared memory made by this user since then (seconds since the epoch) that no process has mapped."""
    found = {}
    with suppress(OSError):
        for file in SHARED_MEMORY.iterdir():
            with suppress(OSError):
                state = file.stat(follow_symlinks=False)
                ours = stat.S_ISREG(state.st_mode) and state.st_uid == os.geteuid()
                if ours and file.name.startswith(SEGMENTS) and state.st_ctime >= since:
                    found[file] = state.st_ino
    mapped = _mapped() if found else set()
    return [file for file, inode in found.items() if inode not in mapped]


def processes(folder: Path) -> list[psutil.Process]:
    """Processes, this one apart, that were started with `folder` as theirs."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(VARIABLE) == str(folder):
                found.append(process)
    return found


def _clear(folder: Path) -> None:
    if not (folder / LOCK).exists():  # gone already
        return
    since = (folder / LOCK).stat().st_mtime
    left = processes(folder)
    # Asked first: multiprocessing's resource trackers then give back what they know of.
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in left:
            with suppress(psutil.Error):
                end(process)
        _, left = psutil.wait_procs(left, GRACE_SECONDS)
    for file in orphans(since):
        file.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _mapped() -> set[int]:
    """Inodes of what processes have mapped or open below the folder of shared memory.

    Names would not do: whoever makes a semaphore has it mapped under the name it had before it got its own.
    """
    found: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            lines = (process / "maps").read_text(errors="replace").splitlines()
            found |= {int(line.split(maxsplit=5)[4]) for line in lines if f" {SHARED_MEMORY}/" in line}
        with suppress(OSError):
            for link in (process / "fd").iterdir():
                with suppress(OSError):
                    if os.readlink(link).startswith(f"{SHARED_MEMORY}/"):
                        found.add(link.stat().st_ino)
    return found
