"""Worker processes: results in order, few items drawn ahead, and an end with the parent, however that comes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vopd.common import worker_pool
from vopd.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import os, signal, sys, time
from multiprocessing import popen_forkserver
from vopd.common import worker_pool
from vopd.common.command import reports_errors

class Interrupted(popen_forkserver.Popen):
    def _launch(self, process):
        super()._launch(process)
        os.killpg(0, signal.SIGINT)

@reports_errors("program")
def main():
    if sys.argv[1] == "now":
        popen_forkserver.Popen = Interrupted
        with worker_pool.workers([]) as pool:
            list(worker_pool.in_order(pool, time.sleep, [0.1] * 1000))
    with worker_pool.workers([]) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        list(worker_pool.in_order(pool, time.sleep, [float(sys.argv[1])] * 1000))

sys.exit(main())
"""


def started(seconds: float) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """A process with workers that are asleep this long, in a group of its own; and all it has started."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM, str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert process.stdout is not None
    worker = psutil.Process(int(process.stdout.readline()))
    helpers = psutil.Process(process.pid).children(recursive=True)
    assert worker in helpers
    return process, helpers


def test_results_are_in_order_and_few_items_are_drawn_ahead() -> None:
    drawn = []

    def items() -> object:
        for seconds in (0.2, *[0.0] * 200):
            drawn.append(seconds)
            yield seconds

    with worker_pool.workers([]) as pool:
        assert list(worker_pool.in_order(pool, abs, range(-30, 0))) == list(range(30, 0, -1))
        results = worker_pool.in_order(pool, time.sleep, items())
        next(results)
        assert len(drawn) <= 1 + worker_pool.AHEAD * worker_pool.MOST
        assert len(list(results)) == 200


def test_an_error_of_the_function_is_raised_here() -> None:
    with worker_pool.workers([]) as pool, pytest.raises(ValueError, match="invalid literal"):
        list(worker_pool.in_order(pool, int, ["1", "no"]))


def test_a_worker_that_is_killed_is_a_sentence() -> None:
    with worker_pool.workers([]) as pool, pytest.raises(UserError, match=r"a worker process ended .* memory"):
        list(worker_pool.in_order(pool, os._exit, [1, 2]))


def test_workers_end_with_a_parent_that_is_killed() -> None:
    process, helpers = started(600)
    process.kill()
    process.wait()
    assert psutil.wait_procs(helpers, timeout=60)[1] == []


def test_ctrl_c_is_answered_by_the_parent_alone() -> None:
    process, helpers = started(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.decode()) == (130, "program: interrupted.\n")
    assert psutil.wait_procs(helpers, timeout=60)[1] == []


def test_ctrl_c_while_a_worker_is_begun_is_answered_by_the_parent_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, "now"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "program: interrupted.\n")
