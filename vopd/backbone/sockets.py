"""A name of its own for the socket through which a run's weights go from the trainer to vLLM.

verl names it by Ray's job id, which is the same in every Ray that a run starts for itself: two runs on one machine
would take each other's sockets away, wait for ever, or load the other's weights. Both ends add the run's token here.
"""

from __future__ import annotations

import os
from uuid import uuid4

VARIABLE = "VOPD_RUN_TOKEN"
"""In the environment of a run's processes; `launch` sets it."""


def token() -> str:
    """A new run's token."""
    return uuid4().hex[:12]


def own(handle: str) -> str:
    """verl's handle, such as ipc:///tmp/NAME.sock, with this run's token in it."""
    folder, name = handle.rsplit("/", 1)
    return f"{folder}/{os.environ[VARIABLE]}-{name}"
