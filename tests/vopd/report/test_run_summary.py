"""The summary of a run against figures counted by hand."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from vopd.errors import UserError
from vopd.evaluation.records import read_records, write_records
from vopd.evaluation.statistics import Interval
from vopd.report.run_summary import Summary, as_json, p_text, percent, read_metrics, render, summarise

MakeRun = Callable[..., Path]


def test_rows_of_a_run(make_run: MakeRun) -> None:
    summary = summarise(make_run(), {"code": "1234567"})
    rows = {row.name: row for row in summary.rows}
    assert list(rows) == ["full", "crop", "gap", "hold-out"]
    values = {n: (r.before.value, r.after.value, r.change.value) for n, r in rows.items()}
    assert values["full"] == pytest.approx((0.60, 0.75, 0.15))
    assert values["crop"] == pytest.approx((0.90, 0.90, 0.0))
    assert values["gap"] == pytest.approx((0.30, 0.15, -0.15))
    assert values["hold-out"] == pytest.approx((0.60, 0.60, 0.0))
    assert {n: r.questions for n, r in rows.items()} == {"full": 100, "crop": 100, "gap": 100, "hold-out": 50}
    assert rows["full"].change.p_value == pytest.approx(2 * 0.5**15)
    assert rows["crop"].change.p_value == 1.0
    assert rows["full"].p_holm == pytest.approx(4 * 2 * 0.5**15)
    assert summary.gap_closed is not None
    assert summary.gap_closed.value == pytest.approx(0.5)
    assert summary.gap_closed.low < 0.5 < summary.gap_closed.high
    assert 0 < summary.minimum_detectable < 0.2


def test_cost_rates_and_metrics(make_run: MakeRun) -> None:
    summary = summarise(make_run(steps=4), {})
    cost = summary.cost
    assert (cost.updates, cost.rollouts, cost.tokens_generated, cost.seconds) == (4, 32, 400, 8.0)
    assert cost.seconds_by_phase == {"step": 8.0, "gen": 2.0}
    assert summary.metrics["loss"] == {"first": 1.0, "last": 0.25}
    assert "seconds/gen" not in summary.metrics
    full = summary.rates["before"]["test/full"]
    assert full == {
        "count": 100,
        "accuracy": 0.6,
        "truncated": 0.01,
        "unparsed": 0.0,
        "response_tokens": 12.0,
    }
    assert summary.rates["before"]["test/full/digit"]["accuracy"] == pytest.approx(0.6)
    assert summary.rates["after"]["holdout/full/letter"]["count"] == 50


def test_summary_json_holds_the_summary_and_what_the_caller_passed(make_run: MakeRun) -> None:
    run = make_run()
    summary = summarise(run, {"code": "1234567", "settings": {"seed": 0, "path": Path("x")}})
    stored = json.loads((run / "summary.json").read_text())
    assert stored["run"] == {"code": "1234567", "settings": {"seed": 0, "path": "x"}}
    assert stored["rows"][0]["change"]["value"] == pytest.approx(summary.rows[0].change.value)
    assert stored["cost"]["tokens_generated"] == 400


def test_summarising_twice_gives_the_same_file(make_run: MakeRun) -> None:
    run = make_run()
    summarise(run, {})
    first = (run / "summary.json").read_text()
    summarise(run, {})
    assert (run / "summary.json").read_text() == first


def test_the_rendered_table(make_run: MakeRun) -> None:
    text = render(summarise(make_run(), {}))
    lines = text.split("\n")
    assert all(len(line) <= 100 for line in lines)
    assert "…" not in text
    full = next(line for line in lines if line.startswith("full"))
    assert "60.0 [50.2, 69.1]" in full
    assert "75.0 [65.7, 82.5]" in full
    assert "+15.0 [" in full
    assert full.split()[-2:] == ["<0.001", "100"]
    assert "400 generated tokens, 8 s" in text
    assert "gap closed          50.0 [" in text


def test_a_pair_that_does_not_match_is_an_error(make_run: MakeRun) -> None:
    run = make_run()
    path = run / "records" / "after.jsonl"
    write_records(path, [r for r in read_records(path).records if r.id != "test-7"])
    with pytest.raises(UserError, match="test-7"):
        summarise(run, {})


@pytest.mark.parametrize(("split", "view"), [("test", "crop"), ("holdout", "full")])
def test_a_missing_part_is_named(make_run: MakeRun, split: str, view: str) -> None:
    run = make_run()
    path = run / "records" / "before.jsonl"
    write_records(path, [r for r in read_records(path).records if (r.split, r.view) != (split, view)])
    with pytest.raises(UserError, match=f"before.jsonl has no answers to split '{split}' in view '{view}'"):
        summarise(run, {})


def test_data_without_a_hold_out_has_no_such_row(make_run: MakeRun) -> None:
    run = make_run()
    for when in ("before", "after"):
        path = run / "records" / f"{when}.jsonl"
        write_records(path, [r for r in read_records(path).records if r.split != "holdout"])
    assert [row.name for row in summarise(run, {}).rows] == ["full", "crop", "gap"]


def test_torn_record_lines_are_reported(make_run: MakeRun) -> None:
    run = make_run()
    path = run / "records" / "after.jsonl"
    path.write_text(path.read_text() + '{"id": "x')
    summary = summarise(run, {})
    assert summary.torn_lines == 1
    assert "1 record line" in render(summary)


def test_no_gap_to_close(make_run: MakeRun) -> None:
    equal = {("test", "full"): 60, ("test", "crop"): 60, ("holdout", "full"): 30}
    summary: Summary = summarise(make_run(before=equal), {})
    assert summary.gap_closed is None
    assert "no gap to close" in render(summary)


def test_metrics_keep_a_repeated_steps_last_line_and_drop_a_torn_one(make_run: MakeRun) -> None:
    run = make_run(steps=2)
    path = run / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "loss": 9.0}\n{"step": 3, "lo')
    metrics = read_metrics(run)
    assert [line["step"] for line in metrics] == [1, 2]
    assert metrics[1]["loss"] == 9.0


@pytest.mark.parametrize("content", ["", "[]\n", '{"loss": 1}\n', "x\n", '{"step": null}\n'])
def test_broken_metrics_are_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path)


def test_missing_metrics_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has not trained"):
        read_metrics(tmp_path)


def test_small_forms() -> None:
    assert percent(Interval(0.1234, 0.1, 0.15)) == "12.3 [10.0, 15.0]"
    assert percent(Interval(0.1, math.nan, math.nan), signed=True) == "+10.0 [?, ?]"
    assert [p_text(p) for p in (0.0004, 0.0123, 0.5)] == ["<0.001", "0.012", "0.50"]
    assert as_json({"a": math.nan, "b": (1, math.inf), "c": Path("x")}) == {
        "a": None,
        "b": [1, None],
        "c": "x",
    }
