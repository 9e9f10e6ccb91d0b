"""Worker processes, one a processor, for work on pictures: results come in the order of the items.

Threads do not do here: a decoder is called for a few kilobytes at a time, and Python's lock is handed on at each call.
Workers are forked from one clean process that has imported what they need: quick, most of their memory is shared, and
the threads of this process do no harm. They end with this process, even where it is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import connection
from typing import TypeVar

from vopd.errors import UserError

MOST = 8
AHEAD = 4
"""Items a worker that are under way or waiting for their turn, so that a slow one does not stop the others."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def workers(preload: Sequence[str]) -> Iterator[ProcessPoolExecutor]:
    """A process for every processor, `MOST` at most; what is not begun when the body ends is dropped.

    preload: modules to import once for all of them, such as that of the function to call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    count = min(MOST, len(os.sched_getaffinity(0)))
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(
    pool: ProcessPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """`function` of every item, in order; few items are drawn before their turn. What it raises is raised here.

    Raises:
        UserError: a worker ended, which is none of `function`'s doing: it was killed, or could not begin.
    """
    source, waiting = iter(items), deque[Future[Result]]()
    ahead = AHEAD * min(MOST, len(os.sched_getaffinity(0)))
    try:
        waiting.extend(pool.submit(function, item) for item in islice(source, ahead))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(source, 1))
            yield result
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process ended before its work was done, perhaps because memory ran out; make room and give "
            "the command again."
        ) from error


def _begin() -> None:
    """In a new worker: one thread, no part in Ctrl-C (the parent answers it), and an end together with the parent."""
    import cv2  # slow to import

    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    connection.wait([parent.sentinel])
    os._exit(1)
