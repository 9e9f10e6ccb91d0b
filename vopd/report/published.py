"""The paper's own figures (published.yaml) as tables of their own, with ours in columns of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from vopd.report.estimates import Base, Row
from vopd.report.run_summary import percent
from vopd.report.text_table import Sheet

FILE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class PublishedRow:
    """A row of the paper: values in per cent by column; recipes of ours that correspond to it, none for base."""

    name: str
    recipes: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Published:
    """A table of the paper; the first `fine_grained` columns are its fine-grained benchmarks, the others held-out."""

    table: str
    title: str
    model: str
    columns: tuple[str, ...]
    fine_grained: int
    rows: tuple[PublishedRow, ...]

    def mean(self, row: PublishedRow) -> float:
        """Mean over the fine-grained columns, in per cent: of the printed figures, so to their rounding."""
        return sum(row.values[: self.fine_grained]) / self.fine_grained


def read() -> list[Published]:
    """All tables of published.yaml."""
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return [
        Published(
            table=t["table"],
            title=t["title"],
            model=t["model"],
            columns=tuple(t["columns"]),
            fine_grained=t["fine_grained"],
            rows=tuple(
                PublishedRow(r["name"], tuple(r["recipe"] or ()), tuple(map(float, r["values"])))
                for r in t["rows"]
            ),
        )
        for t in content["tables"]
    ]


def sheets(rows: Mapping[str, Row], base: Base) -> list[Sheet]:
    """Table 2, and those of the paper's ablations of which we have a run; rows: ours by recipe."""
    tables = read()
    main = {name for table in tables if table.table == "2" for row in table.rows for name in row.recipes}
    own = set(rows) - main
    return [
        _sheet(table, rows, base)
        for table in tables
        if table.table == "2" or any(name in own for row in table.rows for name in row.recipes)
    ]


def _ours(row: PublishedRow, rows: Mapping[str, Row]) -> Row | None:
    return next((rows[name] for name in row.recipes if name in rows), None)


def _sheet(table: Published, rows: Mapping[str, Row], base: Base) -> Sheet:
    return Sheet(
        key=f"published-{table.table}-{table.model[-2:].lower()}",
        title=f"PUBLISHED, not ours: Table {table.table} of the paper, {table.title.lower()}, {table.model}",
        columns=[
            "method",
            *(f"published {column}" for column in table.columns),
            "published mean, fine-grained",
            "ours: full view",
            "ours: change against base",
        ],
        rows=[[row.name, *_figures(table, row), *_beside(row, rows, base)] for row in table.rows],
        notes=[
            f"The columns headed published are the paper's (arXiv 2605.18740, Table {table.table}); the mean over its "
            f"{table.fine_grained} fine-grained benchmarks is computed from them. The columns headed ours come "
            "from the runs of this page, another model on other questions: compare the order of the methods, not the "
            "figures.",
        ],
        published=True,
    )


def _figures(table: Published, row: PublishedRow) -> Sequence[str]:
    return [*(f"{value:.2f}" for value in row.values), f"{table.mean(row):.2f}"]


def _beside(row: PublishedRow, rows: Mapping[str, Row], base: Base) -> Sequence[str]:
    if not row.recipes:
        return [percent(base.measures["full"]), "-"]
    own = _ours(row, rows)
    if own is None:
        return ["-", "-"]
    measure = own.measures["full"]
    return [percent(measure.after), percent(measure.change, signed=True)]
