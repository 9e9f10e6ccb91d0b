"""A request to stop, as a signal: at once where nothing would be lost, else at the next point where a run can be kept.

`vopd run` sends SIGTERM to the training process for the first Ctrl-C or SIGTERM that it gets. While the trainer is
loading, `Stopped` is raised on the spot. Inside `patiently` it is raised by the next `check`: where the trainer waits
for rollouts, before an update begins, and after it has ended; the trainer then saves the last finished update.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(Exception):  # noqa: N818  # a request, not an error
    """The run was asked to stop; it has stopped at a point from which it can be resumed."""


_requested = False
_patient = False


def install() -> None:
    """Take SIGTERM from here on. Call after Ray has started: it sets a handler of its own."""
    signal.signal(signal.SIGTERM, _request)


def check() -> None:
    """Raise `Stopped` if a stop was requested."""
    if _requested:
        raise Stopped


@contextmanager
def patiently() -> Iterator[None]:
    """Within the block a request waits for the next `check`."""
    global _patient
    _patient = True
    try:
        check()
        yield
    finally:
        _patient = False


def _request(*_: Any) -> None:
    global _requested
    _requested = True
    if not _patient:
        raise Stopped
