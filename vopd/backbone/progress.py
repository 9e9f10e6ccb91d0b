"""Progress of a run as lines of progress.jsonl: the trainer writes, the terminal's process reads and draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = "progress.jsonl"
SHOWN = ("loss", "divergence", "rollout_accuracy", "response_length")


class Progress:
    """Appends one JSON object per event; a reader that comes late sees everything."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE

    def note(self, text: str) -> None:
        """What the run is doing now."""
        self._write({"kind": "note", "text": text})

    def step(self, step: int, total: int, line: dict[str, Any]) -> None:
        """A finished training step."""
        shown = {k: line[k] for k in SHOWN if k in line}
        self._write({"kind": "step", "name": "training", "done": step, "total": total} | shown)

    def generation(self, done: int, total: int) -> None:
        """Steps whose rollouts are generated, where all are before the first update."""
        self._write({"kind": "generation", "name": "generating", "done": done, "total": total})

    def evaluation(self, name: str, done: int, total: int) -> None:
        """Questions answered so far in evaluation `name`."""
        self._write({"kind": "evaluation", "name": name, "done": done, "total": total})

    def ending(self) -> None:
        """From here on the run's processes end, one after another."""
        self._write({"kind": "ending"})

    def done(self) -> None:
        """All that the run should do is done."""
        self._write({"kind": "done"})

    def _write(self, event: dict[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(event) + "\n")
