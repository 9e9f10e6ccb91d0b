"""Worker processes, one a processor, for work on pictures: results come in the order of the items.

Threads do not do here: a decoder is called for a few kilobytes at a time, and Python's lock is handed on at each call.
Workers are forked from one clean process that has imported what they need: quick, most of their memory is shared, and
the threads of this process do no harm. They end with this process, even where it is killed. Ctrl-C, which a terminal
sends to all of them, is answered by this process alone.
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
from multiprocessing import connection, resource_tracker
from typing import TypeVar

from vopd.errors import UserError

MOST = 8
AHEAD = 4
"""Items a worker that are under way or waiting for their turn, so that a slow one does not stop the others."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Pool(ProcessPoolExecutor):
    """Processes that are begun whole: one that Ctrl-C met while it was begun would be known to nobody and end in a
    traceback of its own. A process starts with the mask of the one that starts it, so all of them leave Ctrl-C alone.
    """

    def submit(self, function: Callable[..., Result], /, *args: object, **kwargs: object) -> Future[Result]:
        """See `concurrent.futures.Executor.submit`."""
        with _interrupted_later():
            return super().submit(function, *args, **kwargs)


@contextmanager
def workers(preload: Sequence[str]) -> Iterator[Pool]:
    """A process for every processor, `MOST` at most; what is not begun when the body ends is dropped.

    preload: modules to import once for all of them, such as that of the function to call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    resource_tracker.ensure_running()  # unblocks SIGINT when it begins, so it begins before SIGINT is blocked
    count = min(MOST, len(os.sched_getaffinity(0)))
    pool = Pool(count, mp_context=context, initializer=_begin)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(pool: Pool, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
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


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Ctrl-C during the body is answered after it.

    Blocked for this thread and for what is started from it; where another thread is given the signal, Python still
    calls the handler in the main thread, so the handler waits too.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "work is handed to the workers by the main thread, which alone may set a signal's handler."
        )
    asked: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if asked:
            signal.raise_signal(signal.SIGINT)


def _begin() -> None:
    """In a new worker: one thread, and an end together with the parent."""
    import cv2  # slow to import

    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    connection.wait([parent.sentinel])
    os._exit(1)
