"""The processes of a run: which they are, what each is for, and how they are ended.

Every process of a run bears the run's folder in its environment (`MARK`), and children inherit it, however they are
started and whoever adopts them. What is found by that mark is the run's, and nothing else is.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

MARK = "VOPD_RUN_FOLDER"
PR_SET_PDEATHSIG = 1
YOUNG_SECONDS = 10.0
DRIVER = "driver"
REAPER = Path(__file__).with_name("reaper.py")
ROLES = {
    "gcs_server": "Ray control process (gcs_server)",
    "raylet": "Ray node process (raylet)",
    "DashboardAgent": "Ray agent (DashboardAgent)",
    "RuntimeEnvAgent": "Ray agent (RuntimeEnvAgent)",
    "vLLMHttpServer": "vLLM server",
    "EngineCore": "vLLM engine",
    "Worker_": "vLLM engine's worker",
    "WorkerDict": "trainer worker",
    "ViewRolloutWorker": "rollout worker",
    "TransferQueueController": "TransferQueue (controller)",
    "SimpleStorageUnit": "TransferQueue (storage)",
}
"""Name in a process's title -> what the user is told it is. Where several are gone at once, the first one here took the
others along."""
_TITLE = re.compile(r"^(?:ray::|VLLM::)?(\w+)")


def mark(folder: Path) -> dict[str, str]:
    """What a run's processes have in their environment."""
    return {MARK: str(folder.resolve())}


def role_of_title(title: str) -> str | None:
    """The role of a process whose command line begins with `title`, such as ray::WorkerDict.update; None: no role."""
    found = _TITLE.match(title.rsplit("/", 1)[-1])
    if not found:
        return None
    name = found.group(1)
    return ROLES.get(name) or next((role for key, role in ROLES.items() if name.startswith(key)), None)


def role(process: psutil.Process) -> str | None:
    """The role of a process; None where it has none that a run depends on, or is gone."""
    try:
        arguments = process.cmdline()
    except psutil.Error:
        return None
    return role_of_title(arguments[0]) if arguments else None


class Marked:
    """The living processes that bear a run's mark; a look costs milliseconds."""

    def __init__(self, folder: Path) -> None:
        self.value = mark(folder)[MARK]
        self.known: dict[tuple[int, float], bool] = {}

    def look(self) -> list[psutil.Process]:
        """All of them, this process left out, zombies too."""
        found, known, now = [], {}, time.time()
        for process in psutil.process_iter():
            try:
                key = (process.pid, process.create_time())
                ours = self.known.get(key)
                if ours is None:
                    ours = process.environ().get(MARK) == self.value
                if ours and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                    found.append(process)
                # A young process may still have its parent's environment.
                if ours or now - key[1] > YOUNG_SECONDS:
                    known[key] = ours
            except (psutil.Error, OSError):
                continue
        self.known = known
        return found


def end(processes: list[psutil.Process]) -> None:
    """Kill these and wait until they are gone."""
    for process in processes:
        try:
            process.kill()
        except psutil.Error:
            continue
    psutil.wait_procs(processes, timeout=10)


def reaper(mark: str, pass_fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
    """A process that ends all processes with `NAME=VALUE` in their environment once its standard input is closed.

    Which happens however this process ends, kill -9 included; `communicate` closes it and waits until they are gone.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(REAPER), mark],
        stdin=subprocess.PIPE,
        start_new_session=True,
        pass_fds=pass_fds,
    )


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it is gone; at once if it is gone already."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or parent == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def memory_kills() -> int:
    """How many processes the kernel has ended for lack of memory since the machine was started; 0 if it doesn't say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def signal_name(number: int) -> str:
    """Name of a signal, such as SIGKILL for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
