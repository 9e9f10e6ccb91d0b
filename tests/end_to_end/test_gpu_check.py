"""The two runs of `benchmarks.gpu_check`, on a CPU: random weights through the whole stack."""

from pathlib import Path

import pytest

from benchmarks import gpu_check

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


def test_two_updates_of_both_recipes_hold(tmp_path: Path) -> None:
    parts = gpu_check.check("cpu", ["vision_opd", "grpo"], tmp_path / "check.json")
    assert [(part["part"], part["state"]) for part in parts] == [("vision_opd", "ok"), ("grpo", "ok")], parts
    for part in parts:
        values = {row["name"]: row["value"] for row in part["rows"]}
        assert values["updates that are missing"] == 0
        assert values["second update: update_weights"] > 0 and values["second update: step"] > 0
