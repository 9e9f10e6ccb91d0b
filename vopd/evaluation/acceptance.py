"""`acceptance=NAME`: whether an evaluation gives the published figures of a model (vopd/evaluation/acceptance/).

Ours is compared with the paper's figure, both with two decimals, in points (per cent): so many a benchmark, and so many
in the mean over all of them, in either direction. A re-run's figure stands beside it. What is not evaluated, or not
finished, is named; the mean is judged only with every benchmark there. Other settings than those the figures were made
under are named too, and change no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from rich.table import Table

from vopd.errors import UserError
from vopd.evaluation.description import read_as

FOLDER = Path(__file__).with_suffix("")
FIGURES = {
    "accuracy": ("accuracy", "value"),
    "paper mean": ("paper mean", "value"),
    "F1": ("yes/no", "official_f1"),
}
"""Where a figure stands among those of a summary's view."""


@dataclass
class Conditions:
    """What the figures were made under. model and judge are parts of a name; the others are settings."""

    model: str = MISSING
    temperature: float = MISSING
    thinking: bool = MISSING
    max_tokens: int = MISSING
    scorer: str = MISSING
    judge: str = MISSING
    pictures: str = MISSING


@dataclass
class Published:
    """A benchmark's figures in per cent, and which of ours they are compared with."""

    title: str = MISSING
    figure: str = MISSING
    paper: float = MISSING
    rerun: float = MISSING


@dataclass
class Expected:
    """One YAML file: figures by benchmark, and the points by which ours may differ from the paper's."""

    title: str = MISSING
    points: float = MISSING
    points_mean: float = MISSING
    conditions: Conditions = MISSING
    benchmarks: dict[str, Published] = MISSING


@dataclass(frozen=True)
class Row:
    """One benchmark's figures, in per cent with two decimals."""

    title: str
    figure: str
    ours: float
    paper: float
    rerun: float

    @property
    def difference(self) -> float:
        """Ours minus the paper's, in points."""
        return round(self.ours - self.paper, 2)


@dataclass(frozen=True)
class Comparison:
    """What could be compared, and a sentence for each benchmark that could not."""

    expected: Expected
    rows: list[Row]
    missing: list[str]

    @property
    def mean(self) -> Row | None:
        """The means over all benchmarks; None while one is missing."""
        if self.missing or not self.rows:
            return None
        count = len(self.rows)
        ours, paper, rerun = (
            round(sum(getattr(row, key) for row in self.rows) / count, 2)
            for key in ("ours", "paper", "rerun")
        )
        return Row("mean", "", ours, paper, rerun)

    @property
    def outside(self) -> list[Row]:
        """The rows that differ by more than is accepted."""
        found = [row for row in self.rows if abs(row.difference) > self.expected.points]
        if self.mean and abs(self.mean.difference) > self.expected.points_mean:
            found.append(self.mean)
        return found

    @property
    def accepted(self) -> bool:
        """Whether something was compared and nothing is outside."""
        return bool(self.rows) and not self.outside


def find(name: str) -> Expected:
    """Figures by their name or by the path of a YAML file; UserError if there are none, or they are no such figures."""
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_path else FOLDER / f"{name}.yaml"
    if not (path.is_file() if is_path else name in known):
        raise UserError(
            f"acceptance={name}: there are no such figures; known are {', '.join(known)}, or give the path of a YAML "
            "file."
        )
    expected = read_as(Expected, path)
    for key, published in expected.benchmarks.items():
        if published.figure not in FIGURES:
            raise UserError(
                f"{path}: {key}: figure '{published.figure}' is unknown; use one of {', '.join(FIGURES)}."
            )
    numbers = [expected.points, expected.points_mean]
    numbers += [x for published in expected.benchmarks.values() for x in (published.paper, published.rerun)]
    if not all(0 <= number <= 100 for number in numbers) or not expected.benchmarks:
        raise UserError(f"{path}: figures and points are per cent, from 0 to 100, of one benchmark at least.")
    return expected


def compare(expected: Expected, summaries: Sequence[Mapping[str, Any]]) -> Comparison:
    """Set the full view of all questions beside the published figures. summaries: as `results.summarise` makes them."""
    found = {summary["benchmark"]: summary for summary in summaries}
    rows, missing = [], []
    for name, published in expected.benchmarks.items():
        part = found[name]["variants"]["full"].get("full") if name in found else None
        if part is None:
            missing.append(f"{published.title} is not evaluated")
        elif part["questions"] < found[name]["rows_found"]:
            count = f"{part['questions']} of {found[name]['rows_found']}"
            missing.append(f"{published.title} is not finished: {count} questions have a figure")
        elif (value := _value(part, published.figure)) is None:
            missing.append(f"{published.title} has no {published.figure}")
        else:
            ours = round(100 * value, 2)
            rows.append(Row(published.title, published.figure, ours, published.paper, published.rerun))
    return Comparison(expected, rows, missing)


def _value(part: Mapping[str, Any], figure: str) -> float | None:
    group, key = FIGURES[figure]
    value = (part.get(group) or {}).get(key)
    return None if value is None or math.isnan(value) else float(value)


def table(comparison: Comparison) -> Table:
    """The compared figures, with a last row for the mean where it is judged."""
    expected = comparison.expected
    shown = Table(
        title=f"published figures of {expected.title}, per cent; accepted: {expected.points:g} points, "
        f"{expected.points_mean:g} in the mean",
        title_justify="left",
    )
    for column in ("benchmark", "figure", "ours", "paper", "difference", "re-run", ""):
        shown.add_column(column, justify="left" if column in ("benchmark", "figure", "") else "right")
    outside = comparison.outside
    for row in [*comparison.rows, *([comparison.mean] if comparison.mean else [])]:
        shown.add_row(
            row.title,
            row.figure,
            f"{row.ours:.2f}",
            f"{row.paper:.2f}",
            f"{row.difference:+.2f}",
            f"{row.rerun:.2f}",
            "OUT" if row in outside else "within",
        )
    return shown


def verdict(comparison: Comparison) -> Iterator[str]:
    """Sentences: what is out and by how much, what is missing, and whether it is accepted."""
    expected = comparison.expected
    for row in comparison.outside:
        limit = expected.points_mean if row == comparison.mean else expected.points
        yield (
            f"out of acceptance: {row.title} is {row.ours:.2f}, {abs(row.difference):.2f} points "
            f"{'above' if row.difference > 0 else 'below'} the paper's {row.paper:.2f}; {limit:g} are accepted."
        )
    if comparison.missing:
        yield f"not compared: {'; '.join(comparison.missing)}."
        yield "The mean is not judged before all benchmarks are there."
    count = f"{len(comparison.rows)} of {len(expected.benchmarks)} benchmarks"
    yield f"{'accepted' if comparison.accepted else 'NOT accepted'}, by {count}."


def differences(
    expected: Expected, settings: Mapping[str, Any], summaries: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """A sentence for each setting that is not what the figures were made under, and each set of another size.

    settings: by the names of `Conditions`; what is not in it plays no part. judge: None without one.
    """
    for key, wanted in vars(expected.conditions).items():
        now = settings.get(key, wanted)
        same = wanted.lower() in str(now).lower() if key in ("model", "judge") else now == wanted
        if not same:
            yield f"another setting: {key} is {_shown(now)}, the published figures are for {_shown(wanted)}."
    for summary in summaries:
        if summary["benchmark"] in expected.benchmarks and summary["rows_found"] != summary["rows_published"]:
            yield (
                f"another set: {summary['title']} has {summary['rows_found']} questions here, "
                f"{summary['rows_published']} as published."
            )


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
