"""The evaluation command with real vLLM in its process, on the shipped miniature model."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data import schema
from data.miniature import prepare
from vopd.common.paths import ROOT
from vopd.evaluation.benchmark import FOLDER
from vopd.evaluation.records import Record, read_records
from vopd.report.run_folders import find, read

pytestmark = pytest.mark.e2e
ROWS = 1024  # all; many batches of 64: stale cache blocks would show (vopd/backbone/cpu/vllm_blocks.py)
TABLE = ROOT / "docs" / "results" / "miniature"
POINTS = 1.0
"""How far a cell of the README's table may be off when it is answered again (docs/comparing.md)."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature's test set as a benchmark, in a folder of its own."""
    folder = tmp_path_factory.mktemp("evaluation")
    schema.write(prepare.rows("test", ROWS, 0), folder / "test.parquet")
    spec = OmegaConf.load(FOLDER / "miniature_test.yaml")
    spec.folder = str(folder)
    OmegaConf.save(spec, folder / "small.yaml")
    return folder / "small.yaml"


@pytest.fixture(scope="module")
def answered(small: Path) -> list[Record]:
    """Both views of every question, in two goes; that each is answered once is asserted on the way."""
    out = small.parent / "runs"
    overrides = [
        "model=data/miniature/base",
        f"benchmarks=[{small}]",
        f"out={out}",
        "max_tokens=40",
        "concurrency=64",
    ]
    command = [sys.executable, "-P", "-m", "vopd", "evaluate", *overrides]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as temporary:
        run = subprocess.run(
            [*command, "rows=40"],
            env=env | {"TMPDIR": temporary},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert list(Path(temporary).iterdir()) == []
    assert run.returncode == 0, run.stderr[-2000:]
    folder = out / "data_miniature_base" / "small"
    first = read_records(folder / "records.jsonl").records
    assert len(first) == 80
    run = subprocess.run(
        [*command, "--speed"], env=env, cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "questions/s = 1 / mean seconds per question" in run.stdout
    records = read_records(folder / "records.jsonl").records
    assert records[:80] == first
    assert len({(r.id, r.view) for r in records}) == len(records) == 2 * ROWS
    assert all(
        r.details["image_in"] == r.details["image_out"] for r in records
    )  # its scenes need no resizing
    part = json.loads((folder / "summary.json").read_text())["variants"]["full"]
    assert part["full"]["unparsed"] < 0.05 and part["full"]["truncated"] < 0.05
    assert part["gap"]["low"] > 0
    return records


def cell(answers: list[Record], view: str) -> float:
    """Per cent right of all test questions in a view."""
    right = [r.correct for r in answers if r.view == view]
    assert len(right) == ROWS
    return 100 * sum(right) / ROWS


@pytest.mark.parametrize("view", ["full", "crop"])
def test_the_base_models_cells_of_the_table_come_out_again(answered: list[Record], view: str) -> None:
    """By another command than the one that made them, on whatever machine this is."""
    table = read(find([TABLE])[0]).before
    assert abs(cell(answered, view) - cell([r for r in table if r.split == "test"], view)) <= POINTS
