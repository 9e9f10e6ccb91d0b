"""Evaluations of a run: questions are answered once, recorded, and their accuracy kept in evaluations.jsonl."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vopd.backbone.dataset import TripletDataset
from vopd.backbone.progress import Progress
from vopd.backbone.run_history import History
from vopd.evaluation.records import read_records, write_records

Questions = list[tuple[dict[str, Any], str]]
"""Rows, each with the view in which it is shown."""


class Evaluations:
    """See the module's docstring.

    Args:
        run_dir: of the run.
        at_once: questions that are asked at a time.
        answer: greedy answers of the current weights, a record a question.
    """

    def __init__(
        self,
        run_dir: Path,
        at_once: int,
        history: History,
        progress: Progress,
        answer: Callable[[Questions], list[dict[str, Any]]],
    ) -> None:
        self.run_dir, self.at_once, self.answer = run_dir, at_once, answer
        self.history, self.progress = history, progress

    def make(self, name: str, step: int, plan: Any) -> dict[str, float]:
        """Accuracy on every (file, view) of the plan, by name; what was answered before is read, not asked again."""
        path = self.run_dir / "records" / f"{name}.jsonl"
        start = time.perf_counter()
        if not path.exists():
            write_records(path, self._answers(name, plan))
        groups: dict[str, list[bool]] = defaultdict(list)
        for record in read_records(path).records:
            groups[f"{record.split}/{record.view}"].append(record.correct)
        accuracy = {f"evaluation/{k}": sum(v) / len(v) for k, v in groups.items()}
        self.history.add_evaluation(
            {"name": name, "step": step, "seconds": time.perf_counter() - start, **accuracy}
        )
        return accuracy

    def _answers(self, name: str, plan: Any) -> list[dict[str, Any]]:
        questions = [
            (rows, index, view)
            for part in plan
            for rows in [TripletDataset(str(part.file), None, None, max_samples=int(part.rows))]
            for index in range(len(rows))
            for view in part.views
        ]
        records: list[dict[str, Any]] = []
        for first in range(0, len(questions), self.at_once):
            batch = [(rows.row(index), view) for rows, index, view in questions[first : first + self.at_once]]
            records += self.answer(batch)
            self.progress.evaluation(name, len(records), len(questions))
        return records
