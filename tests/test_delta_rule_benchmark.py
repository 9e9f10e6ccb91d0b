"""The benchmark of the delta rule, at a size that a test has time for."""

import pytest

from benchmarks import delta_rule


def test_transformers_traffic_grows_with_the_square_and_ours_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    delta_rule.main("--tokens 256 4096 --heads 1 --size 32".split())
    lines = [
        line.split("|")[1:5]
        for line in capsys.readouterr().out.splitlines()
        if "ours" in line or "transf" in line
    ]
    table = {
        (cells[0].strip(), cells[1].strip()): float(cells[3])
        for cells in lines
        if cells[1].strip() in delta_rule.RULES
    }
    assert table["4,096", "ours"] < 17 * table["256", "ours"]
    assert table["4,096", "transformers"] > 24 * table["256", "transformers"]
