"""Whether a finished run has anything to show: updates that were applied, and a score that is a number.

A run whose every gradient was NaN ends like any other, and its table looks like one of a method that changes nothing.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

AFTER = "after"


def troubles(folder: Path, score: str = "") -> list[str]:
    """What the user must know before reading the run's table, a sentence each; usually nothing.

    Args:
        folder: of a run that has come to its end.
        score: the place of the method's `score`.
    """
    from vopd.report.run_summary import read_metrics  # pulls in scipy

    return [*_of_updates(read_metrics(folder), score), *_of_score(folder)]


def _of_updates(lines: list[dict[str, Any]], score: str) -> list[str]:
    if any(line.get("updates", 1) > 0 for line in lines):
        return []
    if not any(line.get("skipped_updates", 0) > 0 for line in lines):
        return [
            f"all {len(lines)} updates were empty: the method kept no rollout of any; nothing was trained."
        ]
    odd = ", ".join(f"{name}={value}" for name, value in lines[0].items() if _odd(value))
    numbers = f" (step {lines[0]['step']}: {odd})" if odd else ""
    where = f"; look at score and loss of the method [{score}]" if score else ""
    return [
        f"no update of {len(lines)} was applied: their gradients were not finite{numbers}; nothing was trained{where}."
    ]


def _of_score(folder: Path) -> list[str]:
    file = folder / "evaluations.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    last = [line for line in lines if line["name"] == AFTER][-1:]
    return [
        f"the score of '{name.removeprefix('evaluation/')}' after training is {value}; the table says nothing."
        for line in last
        for name, value in line.items()
        if _odd(value)
    ]


def _odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
