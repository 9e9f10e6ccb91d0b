"""Judges a run's processes from outside: which are gone, stopped or stuck.

The terminal's process looks every second at the process table and at the heartbeats in `vitals`. A process that is gone
ends the run: the message says what it was, and how it ended where that is known. Everything else is reported and waited
for, because a stopped process may be continued and a slow call may come back: stopped (SIGSTOP), no heartbeat for 20 s,
an event loop or a call of the recipe that stands still for 20 s, no process that computes for 20 s (they wait for each
other). Where all of that is in order but nothing has been finished for two minutes and for five times the run's longest
step, and every process has stood in one place for a minute, that is said with these places: from outside
busy waiting cannot be distinguished from slow work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from vopd.common import heartbeat, processes
from vopd.common.failures import LOST, Failure, ended

LOOK_SECONDS = 1.0
STOPPED_SECONDS = 5.0
SLOW_SECONDS, SLOW_FACTOR = 120.0, 5.0
IDLE_SECONDS, IDLE_CORES = 20.0, 0.2
"""A run whose processes together take less of the processors than this does not compute; Ray's and vLLM's own
heartbeats take a quarter of it."""
REPEAT_SECONDS, REPEAT_FACTOR = 30.0, 2.0
END_SECONDS = 60.0
PATIENCE_SECONDS = 12.0
"""How long the driver has to say itself why a process is gone, from then or its last note: it knows more, and may be
saving what it has. Finished steps don't count: a run continues for a minute without some of Ray's processes."""


@dataclass
class Trouble:
    """Something that is reported, again after ever longer times, and withdrawn."""

    began: float
    who: str
    said: float = 0.0
    wait: float = 0.0


class Monitor:
    """Reports processes of a run that are gone, stopped or stuck.

    Args:
        folder: of the run.
        driver: pid of the training process.
        clock: CLOCK_MONOTONIC in seconds.
        look: the run's living processes.
        role: of a process, None where a run doesn't depend on it.
    """

    def __init__(
        self,
        folder: Path,
        driver: int,
        clock: Callable[[], float] = time.monotonic,
        look: Callable[[], list[psutil.Process]] | None = None,
        role: Callable[[psutil.Process], str | None] = processes.role,
    ) -> None:
        self.folder, self.driver, self.clock, self.role = folder, driver, clock, role
        self.list_processes = look or processes.Marked(folder).look
        self.memory_kills = processes.memory_kills()
        self.present: dict[int, str] = {}
        self.gone: dict[int, str] = {}
        self.lost_at = 0.0
        self.ending: float | None = None
        self.done = False
        self.troubles: dict[tuple[int, str], Trouble] = {}
        self.looked = 0.0
        self.progress = self.clock()
        self.noted = 0.0
        self.longest = 0.0
        self.places: dict[str, str] = {}
        self.moved = self.progress
        self.tree: list[psutil.Process] = []
        self.used: dict[int, float] = {}
        self.busy = self.progress

    def event(self, event: dict[str, Any]) -> None:
        """Something was finished; from an `ending` on, processes go as they please."""
        now = self.clock()
        self.longest = max(self.longest, now - self.progress)
        self.progress = now
        self.done = self.done or event["kind"] == "done"
        if event["kind"] == "note":
            self.noted = now
        if event["kind"] == "ending":
            self.ending = now

    def look(self) -> list[str]:
        """What is to be said now; at most once a second it looks."""
        now = self.clock()
        if now - self.looked < LOOK_SECONDS:
            return []
        if self.looked and now - self.looked > 10 * LOOK_SECONDS:  # this process itself was stopped
            self.progress = now
        self.tree = self.list_processes()
        self._see_use(now)
        self.looked = now
        if self.ending is not None:
            return []
        self._see_deaths(now)
        found = {} if self.gone else self._see_troubles(now)
        return self._tell(found, now)

    def lost(self) -> Failure | None:
        """The failure of a process that is gone, once the driver has had its time to say more; or of its own end."""
        if self.ending is None:
            due = max(self.lost_at, self.noted) + PATIENCE_SECONDS
            return self.death() if self.clock() > due else None
        if self.clock() - self.ending <= END_SECONDS:
            return None
        return Failure(f"the driver (pid {self.driver}) did not end; it was ended", kind=LOST)

    def death(self) -> Failure | None:
        """The first process that was lost; None if none was."""
        if not self.gone:
            return None
        order = list(processes.ROLES.values())
        pid, role = min(self.gone.items(), key=lambda item: order.index(item[1]))
        code = heartbeat.ended(self.folder).get(pid)
        who = f"{role} (pid {pid})"
        if code is not None:
            return ended(code, who, self.kills())
        for_memory = ": the kernel ended a process for lack of memory" if self.kills() else ""
        return Failure(f"the {who} is gone: it was killed or it crashed{for_memory}", kind=LOST)

    def kills(self) -> int:
        """Processes that the kernel has ended for lack of memory since this run began."""
        return processes.memory_kills() - self.memory_kills

    def _see_deaths(self, now: float) -> None:
        roles = {p.pid: role for p in self.tree if (role := self.role(p))}
        missing = {pid: role for pid, role in self.present.items() if pid not in {p.pid for p in self.tree}}
        if missing and not self.gone:
            self.gone, self.lost_at = missing, now
        self.present |= roles

    def _see_use(self, now: float) -> None:
        """Note when the run's processes last computed."""
        used = {process.pid: _seconds(process) for process in self.tree}
        spent = sum(seconds - self.used.get(pid, 0.0) for pid, seconds in used.items())
        if spent > IDLE_CORES * (now - self.looked):
            self.busy = now
        self.used = used

    def _see_troubles(self, now: float) -> dict[tuple[int, str], tuple[str, str]]:
        """(pid, kind of trouble) -> who, and what is to be said of them."""
        signs = heartbeat.read(self.folder)
        found: dict[tuple[int, str], tuple[str, str]] = {}
        for process in self.tree:
            role = "driver" if process.pid == self.driver else self.role(process)
            if role is None:
                continue
            who = f"the {role} (pid {process.pid})"
            if _stopped(process):
                what = f"is stopped (kill -CONT {process.pid} resumes it)"
                found[process.pid, "stopped"] = who, what
            elif process.pid in signs:
                found |= {(process.pid, k): (who, v) for k, v in self._stuck(signs[process.pid], now)}
        if self.places != (places := {s["role"]: s["at"] for s in signs.values() if s["at"]}):
            self.places, self.moved = places, now
        standing = "; ".join(f"{role} at {place}" for role, place in places.items())
        idle = now - max(self.busy, self.progress, self.moved)
        if idle > IDLE_SECONDS and not found:
            found[0, "idle"] = "the run", f"has computed nothing for {idle:.0f} s ({standing})"
        slow = now - self.progress > max(SLOW_SECONDS, SLOW_FACTOR * self.longest)
        if slow and now - self.moved > SLOW_SECONDS / 2 and not found:
            found[0, "slow"] = "the run", f"has finished nothing for {now - self.progress:.0f} s ({standing})"
        return found

    def _stuck(self, signs: dict[str, Any], now: float) -> list[tuple[str, str]]:
        limit, stacks = heartbeat.SILENCE_SECONDS, self.folder / heartbeat.STACKS
        if (silent := now - signs["beat"]) > limit:
            what = f"has sent no heartbeat for {silent:.0f} s, last {_at(signs)}; see {stacks}"
            return [("silent", what)]
        if signs["call"] and now - signs["call"][1] > limit:
            what, since = signs["call"]
            return [("call", f"has been in {what} for {now - since:.0f} s, {_at(signs)}; see {stacks}")]
        if signs["loop"] is not None and now - signs["loop"] > limit:
            what = f"has been busy in one place for {now - signs['loop']:.0f} s, {_at(signs)}; see {stacks}"
            return [("loop", what)]
        return []

    def _tell(self, found: dict[tuple[int, str], tuple[str, str]], now: float) -> list[str]:
        said = []
        for key in [key for key in self.troubles if key not in found]:
            trouble = self.troubles.pop(key)
            if trouble.said and not self.gone:
                said.append(f"{trouble.who} continues after {now - trouble.began:.0f} s")
        for key, (who, what) in found.items():
            trouble = self.troubles.setdefault(key, Trouble(now, who))
            settled = key[1] != "stopped" or now - trouble.began >= STOPPED_SECONDS
            if settled and now - trouble.said >= trouble.wait:
                trouble.said, trouble.wait = now, max(REPEAT_SECONDS, trouble.wait * REPEAT_FACTOR)
                said.append(f"{who} {what}; waiting (Ctrl-C ends the run)")
        return said


def _at(signs: dict[str, Any]) -> str:
    return f"at {signs['at']}" if signs["at"] else "at an unknown place"


def _stopped(process: psutil.Process) -> bool:
    try:
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.Error:
        return False


def _seconds(process: psutil.Process) -> float:
    """Processor time that a process has taken; 0 where it is gone."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)
