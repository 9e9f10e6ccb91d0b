"""Curves of a comparison over seeds, as SVG images inside the page: gap, accuracy by tokens, training numbers.

One small picture a number, so that each is readable on a phone. A line is a method's mean over its seeds, the band
their range. Colours are Okabe and Ito's; line styles tell methods apart beyond them.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes

from vopd.report.comparison import Comparison
from vopd.report.estimates import Group
from vopd.report.plots import STYLE, figure
from vopd.report.run_folders import Run
from vopd.report.token_budget import points

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#999933")
STYLES = ("-", "--", ":", "-.")
TRAINING = (
    ("rollout_accuracy", "correct answers among rollouts", "%", 100.0),
    ("response_length", "response length", "tokens", 1.0),
    ("entropy", "entropy", "nats a token", 1.0),
    ("divergence", "divergence (methods that have one)", "nats a token", 1.0),
)
Line = list[tuple[float, float]]


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, and what it shows in words."""

    title: str
    uri: str


def pictures(c: Comparison) -> list[Picture]:
    """The curves for which runs have numbers; empty for runs without any."""
    groups = [g for g in c.groups if g.kind == c.main.kind]
    smooth = max(1, max(len(run.metrics) for g in groups for run in g.runs) // 16)
    wanted: list[tuple[str, str, str, Callable[[Run], Line]]] = [
        ("gap on validation questions: crop minus full view", "update", "points", _gap),
        ("full view on validation questions", "update", "%", lambda run: _full(run, tokens=False)),
        (
            "the same by generated tokens",
            "generated tokens, thousands",
            "%",
            lambda run: _full(run, tokens=True),
        ),
    ]
    for key, title, unit, factor in TRAINING:
        name = f"{title}, mean of {smooth} updates" if smooth > 1 else title
        wanted.append((name, "update", unit, lambda run, k=key, f=factor: _metric(run, k, f, smooth)))  # type: ignore[misc]
    drawn = [_draw(groups, *what) for what in wanted]
    return [picture for picture in drawn if picture is not None]


def _gap(run: Run) -> Line:
    return [(p.step, 100 * (p.crop - p.full)) for p in points(run) if p.crop is not None]


def _full(run: Run, tokens: bool) -> Line:
    return [(p.tokens / 1000 if tokens else p.step, 100 * p.full) for p in points(run)]


def _metric(run: Run, key: str, factor: float, smooth: int) -> Line:
    """The numbers of metrics.jsonl, each the mean of `smooth` neighbouring updates."""
    line = [(int(m["step"]), factor * float(m[key])) for m in run.metrics if m.get(key) is not None]
    line = [(step, value) for step, value in line if math.isfinite(value)]
    parts = [line[i : i + smooth] for i in range(0, len(line), smooth)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _draw(
    groups: Sequence[Group], title: str, across: str, unit: str, of: Callable[[Run], Line]
) -> Picture | None:
    lines = {n: [line for run in g.runs if (line := of(run))] for n, g in enumerate(groups)}
    if not any(lines.values()):
        return None
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": title}):
        drawing = figure(4.6, 3.2)
        axis = drawing.subplots()
        for n, own in lines.items():
            if own:
                _curve(
                    axis,
                    groups[n].name,
                    own,
                    COLOURS[n % len(COLOURS)],
                    STYLES[n // len(COLOURS) % len(STYLES)],
                )
        axis.set_xlabel(across)
        axis.set_ylabel(unit)
        axis.legend(frameon=False, fontsize=7.5, ncols=2, loc="best")
        buffer = io.BytesIO()
        drawing.savefig(buffer, format="svg", metadata={"Date": None})
    return Picture(title, "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode())


def _curve(axis: Axes, name: str, lines: Sequence[Line], colour: str, style: str) -> None:
    """Mean and range over seeds where all have the same number of points, else a line a seed."""
    marker = "o" if len(lines[0]) < 20 else None
    if len({len(line) for line in lines}) > 1:
        for n, line in enumerate(lines):
            label = name if n == 0 else None
            axis.plot(
                *zip(*line, strict=True),
                color=colour,
                linestyle=style,
                marker=marker,
                markersize=3,
                label=label,
            )
        return
    # Places differ between seeds where they are tokens; then the points are at their means.
    places = [
        sum(column) / len(column) for column in zip(*([x for x, _ in line] for line in lines), strict=True)
    ]
    columns = list(zip(*([y for _, y in line] for line in lines), strict=True))
    means = [sum(c) / len(c) for c in columns]
    axis.plot(
        places, means, color=colour, linestyle=style, marker=marker, markersize=3, linewidth=1.6, label=name
    )
    if len(lines) > 1:
        axis.fill_between(
            places,
            [min(c) for c in columns],
            [max(c) for c in columns],
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
