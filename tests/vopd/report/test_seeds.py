"""The table over seeds."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vopd.evaluation.records import read_records, write_records
from vopd.report.seeds import main, summarise_seeds
from vopd.report.summary import summarise

MakeRun = Callable[..., Path]


def test_means_over_seeds(make_run: MakeRun) -> None:
    runs = [make_run(f"seed{k}", after={("test", "full"): right}) for k, right in enumerate((70, 75, 80))]
    rows, closed = summarise_seeds(runs)
    named = {row.name: row for row in rows}
    assert named["full"].before.value == pytest.approx(0.60)
    assert named["full"].after.value == pytest.approx(0.75)
    assert named["full"].change.value == pytest.approx(0.15)
    assert named["gap"].change.value == pytest.approx(-0.15)
    assert named["crop"].change.value == 0
    assert named["full"].p_holm < 0.01
    assert closed is not None
    assert closed.value == pytest.approx(0.5)


def test_seeds_that_differ_widen_the_interval(make_run: MakeRun) -> None:
    alike = [make_run(f"a{k}", after={("test", "full"): 75}) for k in range(3)]
    apart = [make_run(f"b{k}", after={("test", "full"): right}) for k, right in enumerate((55, 75, 95))]
    widths = [
        rows[0].change.high - rows[0].change.low
        for rows, _ in (summarise_seeds(alike), summarise_seeds(apart))
    ]
    assert widths[1] > 1.5 * widths[0]


def test_one_seed_agrees_with_its_own_summary(make_run: MakeRun) -> None:
    run = make_run()
    rows, closed = summarise_seeds([run])
    summary = summarise(run, {})
    assert closed == summary.gap_closed
    for over_seeds, single in zip(rows, summary.rows, strict=True):
        assert over_seeds.change.value == pytest.approx(single.change.value)
        assert over_seeds.change.low == pytest.approx(single.change.low, abs=0.011)


def test_the_command_prints_the_table(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(make_run(f"seed{k}")) for k in range(2)]
    assert main(runs) == 0
    printed = capsys.readouterr().out
    assert "2 seeds" in printed
    assert "60.0 ->  75.0" in printed


def test_bad_input_ends_with_code_2(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main([str(make_run()), "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    other = make_run("other")
    path = other / "records" / "after.jsonl"
    write_records(path, [r for r in read_records(path).records if r.id != "test-3"])
    assert main([str(other)]) == 2
    assert "test-3" in capsys.readouterr().err
