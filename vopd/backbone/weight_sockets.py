"""A name of its own for the socket through which a run's weights go from the trainer to vLLM.

verl names it by Ray's job id, which is the same in every Ray that a run starts for itself: two runs on one machine
would take each other's sockets away, wait for ever, or load the other's weights. Both ends add the run's token here.
"""

from __future__ import annotations

import os
import tempfile
from uuid import uuid4

VARIABLE = "VOPD_RUN_TOKEN"
"""In the environment of a run's processes; `launch` sets it."""


def token() -> str:
    """A new run's token."""
    return uuid4().hex[:12]


def own(handle: str) -> str:
    """verl's handle, such as ipc:///tmp/NAME.sock, in this run's temporary folder and with its token."""
    return f"ipc://{tempfile.gettempdir()}/{os.environ[VARIABLE]}-{handle.rsplit('/', 1)[1]}"
