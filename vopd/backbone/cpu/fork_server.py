"""Ray workers that need not import much: they are forked from a process that has done so.

A run has seven processes, each of which would spend 10 to 20 seconds of a core on importing torch, transformers and
vLLM: on two cores most of a start. Ray lets a run name the executable of its workers (`py_executable`); here that is
`warm_worker.py`, which hands its arguments, environment and files to a server, and the server forks. Workers are as
fresh as any: nothing has run in the server but imports, and Ray, which reads its environment when it is imported, is
not among them. For CPU machines: a process that uses CUDA cannot be forked.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import shlex
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from vopd.common import heartbeat, processes

WORKER = Path(__file__).with_name("forked_worker.py")
CHUNK_BYTES = 1 << 16
MODULES = (
    "tensordict",
    "transformers.models.qwen3_5.modeling_qwen3_5",
    "datasets",
    "peft",
    "vllm.model_executor.models.qwen3_5",
)
"""What takes the workers of a run long to import."""


def executable(address: Path) -> str:
    """The `py_executable` for workers of the server at `address`."""
    return shlex.join([sys.executable, "-I", "-S", str(WORKER), str(address)])


def start(address: Path) -> int:
    """Import what workers need and fork the server from this process; returns the descriptor that holds it.

    The server ends when the descriptor is closed, or this process dies.

    Raises:
        RuntimeError: this process runs Python threads, which a fork would lose, or has imported Ray.
    """
    for module in MODULES:
        importlib.import_module(module)
    if threading.active_count() > 1 or "ray" in sys.modules:
        raise RuntimeError(
            "workers can only be forked from a process without threads that has not imported Ray"
        )
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(address))
    listener.listen(64)
    held, holding = os.pipe()
    if not os.fork():
        os.close(holding)
        _end_with(partial(_serve, listener, held))
    os.close(held)
    listener.close()
    return holding


def _serve(listener: socket.socket, held: int) -> None:
    """Answer requests until `held` is closed at the other end."""
    gc.collect()
    gc.freeze()  # else a worker's first collection would copy every page
    signal.signal(signal.SIGCHLD, lambda *_: _note_ends())
    with selectors.DefaultSelector() as ready:
        ready.register(listener, selectors.EVENT_READ)
        ready.register(held, selectors.EVENT_READ)
        while all(key.fileobj != held for key, _ in ready.select()):
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                os.close(held)
                _end_with(partial(_become, connection))
            connection.close()


def _note_ends() -> None:
    """How workers ended: only their parent can know, and explaining a failure needs it."""
    folder = os.environ.get(processes.MARK)
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        if folder:
            heartbeat.note_end(Path(folder), pid, os.waitstatus_to_exitcode(status))


def _become(connection: socket.socket) -> None:
    """Take over what the process at the other end was started with, and run its script."""
    data, files, _, _ = socket.recv_fds(connection, CHUNK_BYTES, 3)
    while more := connection.recv(CHUNK_BYTES):
        data += more
    request = json.loads(data)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    random.seed()
    sys.argv = request["arguments"]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _end_with(job: Callable[[], None]) -> NoReturn:
    """Run `job` and end the process as an interpreter would, without going back into the code that forked."""
    code: Any = 1
    try:
        job()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:  # the end of a process: said and turned into its exit code
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
