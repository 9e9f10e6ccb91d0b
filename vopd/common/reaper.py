"""Ends whatever is left of a run when the process that holds its standard input is gone: `reaper.py NAME=VALUE`.

One is started beside each training process and each `vllm serve`. The command that started those can be killed with a
signal that it cannot handle; Ray's daemons, its workers and vLLM's engine have other parents and sessions by then. They
all bear the variable that is given here in their environment. A script of the standard library alone: it is small,
starts at once, and lives as long as the run.
"""

import os
import signal
import sys
import time

GRACE_SECONDS, PATIENCE_SECONDS = 2.0, 20.0


def bearing(mark: bytes) -> list[int]:
    """Processes with this variable in their environment, zombies (whose environment is empty) left out."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if mark in file.read().split(b"\0"):
                    found.append(int(name))
        except OSError:
            continue
    return found


def main() -> int:
    """0 when nothing is left; 1 if something cannot be killed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    mark = os.fsencode(sys.argv[1])
    while os.read(0, 1):
        pass
    # Asked first: multiprocessing's resource trackers then give back the shared memory that they know of.
    return (
        0
        if ended(mark, signal.SIGTERM, GRACE_SECONDS) or ended(mark, signal.SIGKILL, PATIENCE_SECONDS)
        else 1
    )


def ended(mark: bytes, number: int, seconds: float) -> bool:
    """Whether all are gone within these seconds after a signal."""
    end, asked = time.monotonic() + seconds, set[int]()
    while pids := bearing(mark):
        for pid in set(pids) - asked:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        asked |= set(pids)
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


if __name__ == "__main__":
    sys.exit(main())
