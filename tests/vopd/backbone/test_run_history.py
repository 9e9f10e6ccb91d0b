"""metrics.jsonl and evaluations.jsonl after an interruption: no update twice, no torn line, nothing of the future."""

import json
from pathlib import Path

from vopd.backbone.run_history import History


def history(folder: Path, steps: range) -> History:
    made = History(folder)
    for step in steps:
        made.add_update({"step": step, "loss": step / 10})
    return made


def read(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def test_lines_behind_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    made = history(tmp_path, range(1, 6))
    made.add_evaluation({"name": "before", "step": 0})
    made.add_evaluation({"name": "step4", "step": 4})
    (tmp_path / "records").mkdir()
    for name in ("before", "step2", "step4", "step10"):
        (tmp_path / "records" / f"{name}.jsonl").touch()
    assert made.cut_back(3) == 3
    assert read(made.metrics) == [1, 2, 3] and read(made.evaluations) == [0]
    assert sorted(p.stem for p in (tmp_path / "records").iterdir()) == ["before", "step2"]


def test_a_torn_line_is_dropped_and_the_missing_update_seen(tmp_path: Path) -> None:
    made = history(tmp_path, range(1, 3))
    with made.metrics.open("a") as file:
        file.write('{"step": 3, "lo')
    assert made.cut_back(3) == 2
    made.add_update({"step": 3})
    assert read(made.metrics) == [1, 2, 3]


def test_a_run_that_starts_anew_has_no_lines(tmp_path: Path) -> None:
    made = history(tmp_path, range(1, 3))
    assert made.cut_back(0) == 0 and read(made.metrics) == []
    assert History(tmp_path / "empty").cut_back(0) == 0


def test_an_evaluation_has_one_line_and_can_be_renamed(tmp_path: Path) -> None:
    made = History(tmp_path)
    made.add_evaluation({"name": "after", "step": 4})
    made.add_evaluation({"name": "after", "step": 4})
    made.rename_evaluation("after", "after_step4")
    made.add_evaluation({"name": "after", "step": 8})
    lines = [json.loads(line) for line in made.evaluations.read_text().splitlines()]
    assert [(line["name"], line["step"]) for line in lines] == [("after_step4", 4), ("after", 8)]


def test_the_first_update(tmp_path: Path) -> None:
    assert History(tmp_path).first_update() is None
    assert history(tmp_path, range(1, 3)).first_update() == {"step": 1, "loss": 0.1}
