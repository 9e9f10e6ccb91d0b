"""A run that has nothing to show reports it: no update applied, no score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vopd.runner import result_checks

APPLIED = {"updates": 1, "skipped_updates": 0.0, "empty_updates": 0.0, "loss": 0.1}
SKIPPED = {
    "updates": 0,
    "skipped_updates": 1.0,
    "empty_updates": 0.0,
    "loss": float("nan"),
    "divergence": float("inf"),
}
EMPTY = {"updates": 0, "skipped_updates": 0.0, "empty_updates": 1.0, "loss": 0.0}


def write(folder: Path, lines: list[dict[str, Any]], score: float = 0.5) -> None:
    steps = [json.dumps({"step": i} | line) for i, line in enumerate(lines, 1)]
    (folder / "metrics.jsonl").write_text("\n".join([*steps, ""]))
    evaluations = [
        {"name": "before", "evaluation/test/full": 0.5},
        {"name": "after", "evaluation/test/full": score},
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(e) + "\n" for e in evaluations))


@pytest.mark.parametrize("lines", [[APPLIED], [SKIPPED, APPLIED], [EMPTY, APPLIED, EMPTY]])
def test_one_applied_update_and_a_score_are_enough(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    write(tmp_path, lines)
    assert result_checks.troubles(tmp_path) == []


def test_a_run_whose_updates_were_all_skipped(tmp_path: Path) -> None:
    write(tmp_path, [SKIPPED, EMPTY, SKIPPED])
    (said,) = result_checks.troubles(tmp_path, "mine.py, line 8, in score")
    assert "no update of 3 was applied" in said
    assert "loss=nan, divergence=inf" in said and "mine.py, line 8" in said


def test_a_run_whose_updates_were_all_empty(tmp_path: Path) -> None:
    write(tmp_path, [EMPTY, EMPTY])
    assert "all 2 updates were empty" in result_checks.troubles(tmp_path)[0]


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_no_number(tmp_path: Path, score: float) -> None:
    write(tmp_path, [APPLIED], score)
    assert result_checks.troubles(tmp_path) == [
        f"the score of 'test/full' after training is {score}; the table says nothing."
    ]
