"""Pictures of a run: the training curve, and accuracy before and after with the gap.

Colours are Okabe and Ito's (2008), distinguishable by the colour-blind; views also differ in marker and fill.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vopd.report.run_summary import Row, Summary, read_metrics

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#555555"
PANELS = (
    ("loss", "loss", BLUE),
    ("divergence", "divergence\n(nats a token)", GREEN),
    ("response_length", "response length\n(tokens)", ORANGE),
)
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a name with $ in it is a name
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
}


def plot_run(run_dir: Path, summary: Summary, title: str) -> list[Path]:
    """Draw both pictures into run_dir/plots; returns their paths. UserError when metrics.jsonl is missing."""
    folder = run_dir / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "training.png", folder / "accuracy.png"]
    plot_training(read_metrics(run_dir), paths[0], title)
    plot_accuracy(summary.rows, paths[1], title)
    return paths


def figure(width: float, height: float) -> Figure:
    """A figure without pyplot's global state, so that drawing is safe in any process."""
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` finite values at each place."""
    result = []
    for end in range(1, len(values) + 1):
        recent = [v for v in values[max(0, end - window) : end] if math.isfinite(v)]
        result.append(sum(recent) / len(recent) if recent else math.nan)
    return result


def plot_training(metrics: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Loss, divergence and response length by step, with a running mean; numbers a method lacks are left out."""
    panels = [panel for panel in PANELS if any(panel[0] in line for line in metrics)]
    with matplotlib.rc_context(STYLE):
        drawing = figure(7.5, 0.6 + 2.0 * len(panels))
        axes = drawing.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (key, label, colour) in zip(axes, panels, strict=True):
            _curve(axis, [(line["step"], float(line.get(key, math.nan))) for line in metrics], colour)
            axis.set_ylabel(label)
        axes[-1].set_xlabel("update")
        axes[0].set_title(title, loc="left", fontweight="bold")
        drawing.align_ylabels(axes)
        drawing.savefig(path, dpi=130)


def _curve(axis: Axes, points: Sequence[tuple[int, float]], colour: str) -> None:
    steps, values = zip(*points, strict=True)
    if len(points) < 20:  # few enough to see each
        axis.plot(steps, values, color=colour, marker="o", markersize=4, linewidth=1.5)
        return
    window = max(5, len(points) // 20)
    axis.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
    axis.plot(
        steps, _running_mean(values, window), color=colour, linewidth=2, label=f"mean of {window} updates"
    )
    axis.legend(frameon=False, loc="best", fontsize=8)


def plot_accuracy(rows: Sequence[Row], path: Path, title: str) -> None:
    """Full and crop accuracy before and after with 95% intervals, and the gap between them as a bracket."""
    named = {row.name: row for row in rows}
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "y"}):
        drawing = figure(6.2, 4.4)
        axis = drawing.subplots()
        for name, colour, marker in (("crop", ORANGE, "s"), ("full", BLUE, "o")):
            _points(axis, named[name], colour, marker, upper=name == "crop")
        for x, when in enumerate(("before", "after")):
            full, crop, gap = (getattr(named[name], when) for name in ("full", "crop", "gap"))
            _bracket(axis, x + (0.2, 0.36)[x], 100 * full.value, 100 * crop.value, _gap_text(gap))
        axis.set_xlim(-0.35, 1.85)
        axis.set_xticks([0, 1], ["before training", "after training"])
        axis.set_ylabel("accuracy (%)")
        axis.set_title(title, loc="left", fontweight="bold")
        axis.legend(frameon=False, loc="lower right", ncols=2)
        low, high = axis.get_ylim()
        axis.set_ylim(max(0, low - 0.2 * (high - low)), min(101, high + 2))
        drawing.savefig(path, dpi=130)


def _points(axis: Axes, row: Row, colour: str, marker: str, upper: bool) -> None:
    sides = (row.before, row.after)
    values = [100 * side.value for side in sides]
    # Rounding may put an estimate of exactly 0 or 1 a hair outside its limits.
    below = [max(0.0, 100 * (side.value - side.low)) for side in sides]
    above = [max(0.0, 100 * (side.high - side.value)) for side in sides]
    shift = 0.02 if upper else -0.02  # so that overlapping intervals show
    places = [shift, 1 + shift]
    axis.plot(places, values, color=colour, linewidth=1, alpha=0.5, linestyle="--")
    axis.errorbar(
        places, values, yerr=[below, above], color=colour, marker=marker, markersize=8, linestyle="none",
        capsize=4, label=f"{row.name} view",
    )  # fmt: skip
    # Labels are on the outer sides of the connecting line.
    for place, value, align, away in zip(places, values, ("right", "left"), (-11, 11), strict=True):
        axis.annotate(
            f"{value:.1f}", (place, value), xytext=(away, 6 if upper else -6), textcoords="offset points",
            ha=align, va="center", color=GREY,
        )  # fmt: skip


def _gap_text(gap: Any) -> str:
    return f"gap {100 * gap.value:.1f}\n[{100 * gap.low:.1f}, {100 * gap.high:.1f}]"


def _bracket(axis: Axes, x: float, low: float, high: float, text: str) -> None:
    arm = 0.035
    axis.plot([x - arm, x, x, x - arm], [low, low, high, high], color=GREY, linewidth=1.3)
    axis.annotate(
        text, (x, (low + high) / 2), xytext=(6, 0), textcoords="offset points", va="center", color=GREY
    )
