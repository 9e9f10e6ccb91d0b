"""What is said of processes that are gone, stopped or stuck; on a clock and a process table of the test's own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vopd.common import heartbeat, processes
from vopd.common.processes import ROLES, role_of_title
from vopd.runner import monitor
from vopd.runner.monitor import Monitor

DRIVER = 100


class Machine:
    """A run's processes, by pid, and a clock."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.now, self.kills = folder, 1000.0, 0
        self.table = {
            DRIVER: "",
            1: "gcs_server",
            2: "raylet",
            3: "WorkerDict",
            4: "ViewRolloutWorker",
            5: "EngineCore",
        }
        self.status: dict[int, str] = {}
        self.used, self.cores = 0.0, 1.0
        (folder / heartbeat.FOLDER).mkdir()
        monkeypatch.setattr(processes, "memory_kills", lambda: self.kills)
        self.monitor = Monitor(
            folder, DRIVER, lambda: self.now, self.look, lambda p: ROLES.get(self.table[p.pid])
        )

    def look(self) -> list[Any]:
        return [
            SimpleNamespace(
                pid=pid,
                status=lambda pid=pid: self.status.get(pid, "sleeping"),
                cpu_times=lambda: SimpleNamespace(user=self.used / len(self.table), system=0.0),
            )
            for pid in self.table
        ]

    def pass_time(self, seconds: float, beating: bool = True, **signs: Any) -> list[str]:
        """What was said meanwhile; `signs` are those of the trainer worker."""
        said = []
        for _ in range(int(seconds)):
            self.now += 1.0
            self.used += self.cores
            if beating:
                self.beat(3, **signs)
            said += self.monitor.look()
        return said

    def beat(self, pid: int, **signs: Any) -> None:
        own = {
            "role": "trainer worker",
            "beat": self.now,
            "loop": None,
            "call": None,
            "at": "x.py, line 3, in f",
        }
        (self.folder / heartbeat.FOLDER / f"{pid}.json").write_text(json.dumps(own | signs))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_a_healthy_run_is_never_spoken_of(machine: Machine) -> None:
    for _ in range(20):
        assert machine.pass_time(100) == []
        machine.monitor.event({"kind": "step"})
    assert machine.monitor.lost() is None


def test_slow_steps_are_known_from_the_runs_own_longest(machine: Machine) -> None:
    machine.pass_time(110)
    machine.monitor.event({"kind": "step"})
    assert machine.pass_time(500) == []  # five times as long as the longest
    (said,) = machine.pass_time(60)
    assert (
        said.startswith("the run has finished nothing for") and "trainer worker at x.py, line 3, in f" in said
    )


def test_what_moves_is_not_called_stuck(machine: Machine) -> None:
    for line in range(100):
        assert machine.pass_time(10, at=f"x.py, line {line}, in f") == []


def test_a_process_that_is_gone_ends_the_run_once_the_driver_has_had_its_time(machine: Machine) -> None:
    machine.pass_time(3)
    del machine.table[4]
    machine.pass_time(monitor.PATIENCE_SECONDS)
    assert machine.monitor.lost() is None
    machine.pass_time(2)
    lost = machine.monitor.lost()
    assert lost is not None
    assert (lost.sentence, lost.code) == (
        "the rollout worker (pid 4) is gone: it was killed or it crashed",
        1,
    )


def test_steps_that_go_on_without_it_do_not_put_it_off_but_a_save_does(machine: Machine) -> None:
    machine.pass_time(3)
    del machine.table[1]
    for _ in range(10):
        machine.pass_time(1)
        machine.monitor.event({"kind": "step"})
    machine.monitor.event({"kind": "note", "text": "saving"})
    machine.pass_time(5)
    assert machine.monitor.lost() is None
    machine.pass_time(10)
    assert machine.monitor.lost() is not None


def test_the_first_that_was_lost_is_named_and_of_several_the_one_that_took_the_others_along(
    machine: Machine,
) -> None:
    machine.pass_time(3)
    del machine.table[2], machine.table[4], machine.table[5]
    machine.pass_time(2)
    del machine.table[1]
    machine.pass_time(20)
    lost = machine.monitor.lost()
    assert lost is not None and "raylet" in lost.sentence and "(pid 2)" in lost.sentence


def test_how_it_ended_is_told_where_its_parent_saw_it(machine: Machine) -> None:
    machine.pass_time(3)
    heartbeat.note_end(machine.folder, 3, -9)
    del machine.table[3]
    machine.pass_time(20)
    machine.kills = 1
    lost = machine.monitor.lost()
    assert lost is not None
    assert (
        lost.sentence
        == "the trainer worker (pid 3) was killed by SIGKILL: the kernel ended it for lack of memory"
    )


def test_processes_may_go_when_the_run_ends_but_not_for_ever(machine: Machine) -> None:
    machine.pass_time(3)
    machine.monitor.event({"kind": "ending"})
    machine.table = {DRIVER: ""}
    assert machine.pass_time(monitor.END_SECONDS) == [] and machine.monitor.lost() is None
    machine.pass_time(2)
    lost = machine.monitor.lost()
    assert lost is not None and "did not end" in lost.sentence


def test_a_stopped_process_is_told_of_again_and_again_and_taken_back(machine: Machine) -> None:
    machine.pass_time(3)
    machine.status[3] = "stopped"
    said = machine.pass_time(100, beating=False)
    assert len(said) == 3
    assert all("the trainer worker (pid 3) is stopped (kill -CONT 3 resumes it)" in text for text in said)
    machine.status.clear()
    (back,) = machine.pass_time(10)
    assert back.startswith("the trainer worker (pid 3) continues after 1")
    assert machine.monitor.lost() is None


def test_the_driver_too(machine: Machine) -> None:
    machine.status[DRIVER] = "stopped"
    assert f"the driver (pid {DRIVER}) is stopped" in machine.pass_time(10)[0]


def test_a_process_that_was_stopped_for_a_moment_is_not_told_of(machine: Machine) -> None:
    machine.status[3] = "stopped"
    assert machine.pass_time(3, beating=False) == []
    machine.status.clear()
    assert machine.pass_time(10) == []


def test_a_process_without_a_sign_of_life_is_told_of_within_thirty_seconds(machine: Machine) -> None:
    machine.pass_time(3)
    said = machine.pass_time(30, beating=False)
    assert "the trainer worker (pid 3) has sent no heartbeat for 21 s, last at x.py, line 3, in f" in said[0]
    assert str(machine.folder / heartbeat.STACKS) in said[0]


def test_a_call_of_the_recipe_that_does_not_come_back(machine: Machine) -> None:
    since = machine.now
    said = machine.pass_time(30, call=["score of the recipe", since], at="mine.py, line 9, in score")
    assert "has been in score of the recipe for 21 s, at mine.py, line 9, in score" in said[0]
    assert "continues" in machine.pass_time(3)[0]


def test_an_event_loop_that_does_not_turn(machine: Machine) -> None:
    since = machine.now
    assert "has been busy in one place for 21 s" in machine.pass_time(30, loop=since)[0]


def test_processes_that_wait_for_each_other_are_told_of_within_thirty_seconds(machine: Machine) -> None:
    assert machine.pass_time(60) == []
    machine.cores = 0.05  # heartbeats
    said = machine.pass_time(30)
    assert said == [
        "the run has computed nothing for 21 s (trainer worker at x.py, line 3, in f); waiting (Ctrl-C ends the run)"
    ]
    machine.cores = 1.0
    assert machine.pass_time(3) == ["the run continues after 10 s"]


def test_an_idle_run_whose_processes_move_is_not_called_stuck(machine: Machine) -> None:
    machine.cores = 0.05
    for line in range(60):
        assert machine.pass_time(1, at=f"x.py, line {line}, in f") == []


def test_a_torn_file_of_signs_is_no_error(machine: Machine) -> None:
    machine.beat(3)
    (machine.folder / heartbeat.FOLDER / "3.json").write_text('{"role"')
    assert machine.pass_time(3, beating=False) == []


@pytest.mark.parametrize(
    ("title", "role"),
    [
        ("ray::WorkerDict.actor_rollout_update_actor", "trainer worker"),
        ("ray::ViewRolloutWorker", "rollout worker"),
        ("VLLM::EngineCore", "vLLM engine"),
        ("VLLM::Worker_TP0", "vLLM engine's worker"),
        ("/somewhere/ray/core/src/ray/raylet/raylet", "Ray node process (raylet)"),
        ("ray::IDLE", None),
        ("/usr/bin/python3", None),
        ("", None),
    ],
)
def test_roles(title: str, role: str | None) -> None:
    assert role_of_title(title) == role
