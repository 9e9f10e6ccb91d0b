"""What a run has written line by line: metrics.jsonl (one line an update), evaluations.jsonl (one an evaluation).

Lines are appended as they come, so the files may be ahead of the checkpoint that a run resumes from; `cut_back` drops
what is made again, so that no update appears twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vopd.common import files

Line = dict[str, Any]


class History:
    """The two files of a run folder."""

    def __init__(self, run_dir: Path) -> None:
        self.metrics, self.evaluations = run_dir / "metrics.jsonl", run_dir / "evaluations.jsonl"
        self.records = run_dir / "records"

    def add_update(self, line: Line) -> None:
        """Append the line of an update."""
        _append(self.metrics, line)

    def add_evaluation(self, line: Line) -> None:
        """Append the line of an evaluation, unless it is there already under its name."""
        if line["name"] not in {other["name"] for other in _lines(self.evaluations)}:
            _append(self.evaluations, line)

    def rename_evaluation(self, name: str, new: str) -> None:
        """Call an evaluation otherwise, so that there can be another one under its name."""
        _rewrite(self.evaluations, lambda line: line | {"name": new} if line["name"] == name else line)

    def first_update(self) -> Line | None:
        """The line of the run's first update, if it was made."""
        return next(iter(_lines(self.metrics)), None)

    def cut_back(self, step: int) -> int:
        """Drop lines and records of updates after `step`, and a torn last line; the last update that is left."""
        for file in (self.metrics, self.evaluations):
            _rewrite(file, lambda line: line if line["step"] <= step else None)
        for file in self.records.glob("step*.jsonl"):
            if int(file.stem.removeprefix("step")) > step:
                file.unlink()
        return max((int(line["step"]) for line in _lines(self.metrics)), default=0)


def _append(file: Path, line: Line) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def _lines(file: Path) -> list[Line]:
    """Whole lines; one that a kill has torn is not."""
    if not file.exists():
        return []
    whole = file.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def _rewrite(file: Path, changed: Callable[[Line], Line | None]) -> None:
    """Put `changed(line)` in the place of every line, nothing in the place of those for which it is None."""
    if file.exists():
        kept = [new for line in _lines(file) if (new := changed(line)) is not None]
        files.write_text(file, "".join(json.dumps(line) + "\n" for line in kept))
