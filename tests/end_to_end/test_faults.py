"""A recipe's mistake, made in the trainer worker in the middle of a run, reaches the terminal with its file and line.

Every other fault, of every process, is measured by `python -m benchmarks.faults` (docs/faults.md).
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vopd.common import processes
from vopd.runner import new_recipe

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

Overrides = Callable[..., list[str]]


def test_a_mistake_in_score_is_told_with_file_and_line(tmp_path: Path, overrides_for: Overrides) -> None:
    yaml, module, _ = new_recipe.new("mine", tmp_path / "recipe")
    right, wrong = "(teacher_CV - student_CV)", "(teacher_CV - student_CV[:, :-1])"
    module.write_text(module.read_text().replace(right, wrong))
    line = next(i for i, text in enumerate(module.read_text().splitlines(), 1) if wrong in text)
    overrides = [*overrides_for(tmp_path / "run"), "evaluate.test_rows=4", "evaluate.holdout_rows=4"]
    told = subprocess.run(
        [sys.executable, "-P", "-m", "vopd", "run", str(yaml), *overrides],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=800,
    )
    first, second = told.stderr.strip().splitlines()
    assert first.startswith("vopd: RuntimeError: The size of tensor a"), told.stderr
    assert f"[{module}, line {line}, in score: return" in first
    assert "raised in the trainer worker (pid " in second and str(tmp_path / "run" / "log.txt") in second
    assert told.returncode == 1
    assert processes.Marked(tmp_path / "run").look() == []
    assert not (tmp_path / "run" / "lock").exists()
