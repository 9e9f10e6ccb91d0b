"""Heartbeats: written by the process itself, whatever it is doing, and read by another."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vopd.common import heartbeat, processes
from vopd.config import ROOT

BUSY = """
import asyncio, sys, time
from vopd.common import heartbeat
heartbeat.BEAT_SECONDS, heartbeat.SILENCE_SECONDS = 0.05, 0.6

def score():
    while True:
        pass

async def stuck():
    heartbeat.start("rollout worker", asyncio.get_running_loop())
    await asyncio.sleep(0.3)
    time.sleep(600)

if sys.argv[1] == "call":
    heartbeat.start("trainer worker")
    with heartbeat.calling("score of the recipe"):
        score()
if sys.argv[1] == "loop":
    asyncio.run(stuck())
if sys.argv[1] == "lock":
    import ctypes
    heartbeat.start("vLLM engine")
    time.sleep(0.3)
    ctypes.PyDLL(None).sleep(600)  # keeps Python's lock
"""


def watched(folder: Path, what: str, ready: Any) -> dict[str, Any]:
    """The signs of a process that does this, once they are as wished."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", BUSY, what],
        env=os.environ | processes.mark(folder) | {"PYTHONPATH": str(ROOT)},
    )
    try:
        while True:
            assert process.poll() is None
            signs = heartbeat.read(folder).get(process.pid)
            if signs and ready(signs):
                return signs
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()


def stacks(folder: Path) -> str:
    return "".join(file.read_text() for file in (folder / heartbeat.STACKS).glob("*.txt"))


def test_a_call_that_does_not_come_back_is_seen_with_its_place_and_stacks(tmp_path: Path) -> None:
    signs = watched(tmp_path, "call", lambda signs: signs["call"] and "in score" in stacks(tmp_path))
    assert signs["role"] == "trainer worker"
    assert signs["call"][0] == "score of the recipe" and signs["beat"] > signs["call"][1]
    assert signs["at"].endswith("in score")


def test_an_event_loop_that_stands_still_is_seen(tmp_path: Path) -> None:
    signs = watched(tmp_path, "loop", lambda signs: signs["beat"] - signs["loop"] > 0.5 and stacks(tmp_path))
    assert "in stuck" in signs["at"]


def test_the_stacks_of_a_process_that_keeps_pythons_lock_are_written(tmp_path: Path) -> None:
    watched(tmp_path, "lock", lambda _: "Timeout" in stacks(tmp_path))
    assert "vLLM_engine" in next((tmp_path / heartbeat.STACKS).glob("*.txt")).name


def test_a_process_of_no_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(processes.MARK, raising=False)
    monkeypatch.chdir(tmp_path)
    heartbeat.start("driver")
    assert list(tmp_path.iterdir()) == []


def test_how_processes_ended(tmp_path: Path) -> None:
    assert heartbeat.ended(tmp_path) == {}
    (tmp_path / heartbeat.FOLDER).mkdir()
    heartbeat.note_end(tmp_path, 4, -9)
    heartbeat.note_end(tmp_path, 5, 0)
    assert heartbeat.ended(tmp_path) == {4: -9, 5: 0}
