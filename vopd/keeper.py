"""Ends whatever is left of a run when the process that holds its standard input is gone: `keeper.py NAME=VALUE`.

`watch.run` starts one beside each training process. A run's terminal can be killed with a signal that it cannot
handle; Ray's daemons, its workers and vLLM's engine have other parents and sessions by then. They all bear the
variable that is given here in their environment. A script of the standard library alone: it is small, starts at
once, and lives as long as the run.
"""

import os
import signal
import sys
import time

PATIENCE_SECONDS = 20.0


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
    end = time.monotonic() + PATIENCE_SECONDS
    while pids := bearing(mark):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > end:
            return 1
        time.sleep(0.05)
    return 0


if __name__ == "__main__":
    sys.exit(main())
