"""The benchmark of a step's bytes and encodings, at a size that a test has time for."""

import pytest

from benchmarks import data_path


def test_today_stores_an_eighth_once_a_prompt_and_encodes_least(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_path, "MEGAPIXELS", {"full": (0.3, 0.6), "crop": (0.05, 0.1)})
    monkeypatch.setattr(data_path, "GIB", 1)
    data_path.main("--prompts 8 --rollouts 4 --ranks 2 --tokens 6000".split())
    rows = [
        [float(cell) for cell in line.split("|")[2:5]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("| float32", "| bytes"))
    ]
    each, once, today = rows
    assert each[0] == pytest.approx(4 * once[0])
    assert once[0] == pytest.approx(8 * today[0], rel=0.02)
    assert today[1] == 4 < once[1] <= 8
    assert today[2] < once[2]
