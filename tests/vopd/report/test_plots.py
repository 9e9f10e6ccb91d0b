"""Plots are drawn, hold what they should and do not break on odd runs."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vopd.evaluation.statistics import Difference, Interval
from vopd.report import plots
from vopd.report.run_summary import Row, summarise

MakeRun = Callable[..., Path]
NO_CHANGE = Difference(0.0, 0.0, 0.0, 1.0)


def row(name: str, before: Interval, after: Interval) -> Row:
    return Row(name, 100, before, after, NO_CHANGE, 1.0)


def colours(path: Path) -> set[str]:
    """Hex colours of the picture's pixels."""
    image = Image.open(path).convert("RGB")
    counted = image.getcolors(maxcolors=image.width * image.height) or []
    return {"#{:02X}{:02X}{:02X}".format(*rgb) for _, rgb in counted}


def test_both_pictures_of_a_run(make_run: MakeRun) -> None:
    run = make_run(steps=30)
    training, accuracy = plots.plot_run(run, summarise(run, {}), "A run")
    assert {plots.BLUE, plots.GREEN, plots.ORANGE} <= colours(training)
    assert {plots.BLUE, plots.ORANGE, plots.GREY} <= colours(accuracy)
    assert plots.GREEN not in colours(accuracy)


def test_a_method_without_a_divergence_has_two_panels(tmp_path: Path) -> None:
    full, short = tmp_path / "full.png", tmp_path / "short.png"
    line = {"loss": 1.0, "response_length": 9.0}
    plots.plot_training([{"step": s, **line, "divergence": 0.1} for s in range(3)], full, "three")
    plots.plot_training([{"step": s, **line} for s in range(3)], short, "two")
    assert Image.open(short).height < Image.open(full).height
    assert plots.GREEN not in colours(short)


def test_numbers_that_are_not_finite_leave_gaps(tmp_path: Path) -> None:
    path = tmp_path / "t.png"
    plots.plot_training([{"step": s, "loss": math.nan if s % 3 else 1.0} for s in range(40)], path, "gaps")
    assert plots.BLUE in colours(path)


def test_running_mean_by_hand() -> None:
    means = plots._running_mean([1.0, 3.0, math.nan, 5.0], 2)
    assert means == pytest.approx([1.0, 2.0, 3.0, 5.0])
    assert math.isnan(plots._running_mean([math.nan], 2)[0])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_extreme_accuracies_are_drawn(tmp_path: Path, value: float) -> None:
    side = Interval(value, value + 1e-17 if value == 0 else value, value - 1e-16 if value == 1 else value)
    path = tmp_path / "a.png"
    gap = Interval(0.0, 0.0, 0.0)
    plots.plot_accuracy(
        [row("full", side, side), row("crop", side, side), row("gap", gap, gap)], path, "extreme"
    )
    assert path.stat().st_size > 0
