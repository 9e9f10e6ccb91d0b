"""The trackers of a run, none of which can end it: one that fails is dropped, with a note on the terminal.

metrics.jsonl, which is always written, holds everything they are sent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import psutil

FINISH_SECONDS = 60.0  # to send what is left; without a network wandb would try for days


class Trackers:
    """Stands for verl's `Tracking`, with one of those for each tracker.

    Args:
        make: verl's class.
        note: tells the terminal.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        note: Callable[[str], None],
        project_name: str,
        experiment_name: str,
        default_backend: Sequence[str],
        config: Any = None,
    ) -> None:
        self._note = note
        self._running: dict[str, Any] = {}
        for name in default_backend:
            found: list[Any] = []

            def start(name: str = name, found: list[Any] = found) -> None:
                found.append(make(project_name, experiment_name, [name], config))

            if self._tried(name, start):
                self._running[name] = found[0]

    def log(self, data: dict[str, Any], step: int, backend: Any = None) -> None:
        """Numbers of a step, to every tracker that still works."""
        for name, tracker in list(self._running.items()):
            if not self._tried(name, partial(tracker.log, data=data, step=step, backend=backend)):
                del self._running[name]

    def finish(self, exit_code: int = 0) -> None:
        """Give each some time to send what it has; what wandb has not sent by then stays in its files."""
        for name, tracker in self._running.items():
            done = threading.Thread(
                target=self._tried, args=(name, partial(tracker.finish, exit_code=exit_code)), daemon=True
            )
            done.start()
            done.join(FINISH_SECONDS)
            if done.is_alive():
                self._note(f"{name} could not send everything in {FINISH_SECONDS:g} s; its files are kept")
                _end_service()
        self._running = {}

    def _tried(self, name: str, call: Callable[[], object]) -> bool:
        try:
            call()
        except Exception as error:  # a boundary: whatever a tracker's library raises, training continues
            why = (str(error).strip().splitlines() or [""])[0]
            self._note(f"{name} is left out from here on ({type(error).__name__}: {why})")
            return False
        return True


def _end_service() -> None:
    """End wandb's own process, which this one would wait for at its end."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "wandb" in child.name():
                child.kill()
