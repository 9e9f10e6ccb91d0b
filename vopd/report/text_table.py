"""A table as text cells, the one form that Markdown, HTML and the terminal are written from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO

from rich import box
from rich.table import Table

from vopd.common.markdown import escaped
from vopd.common.terminal import Terminal


@dataclass(frozen=True)
class Sheet:
    """A titled table; the first column names the row. `notes` go below it; `published`: the paper's figures, not
    ours. key: its anchor in the page."""

    key: str
    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    published: bool = False


def to_markdown(sheet: Sheet, level: int = 2) -> str:
    """Heading, pipe table and notes; what would end a cell or open a tag is escaped."""
    lines = [
        "|" + "|".join(f" {escaped(c)} " for c in sheet.columns) + "|",
        "|---" * len(sheet.columns) + "|",
    ]
    lines += ["|" + "|".join(f" {escaped(c)} " for c in row) + "|" for row in sheet.rows]
    return "\n".join([f"{'#' * level} {escaped(sheet.title)}", "", *lines, *_notes(sheet.notes)]) + "\n"


def _notes(notes: Sequence[str]) -> list[str]:
    return ["", *(f"- {escaped(note)}" for note in notes)] if notes else []


def to_terminal(sheet: Sheet, width: int) -> str:
    """Plain text; cells wrap where the table is wider than `width`."""
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title=sheet.title, title_justify="left",
        title_style="bold",
    )  # fmt: skip
    for number, column in enumerate(sheet.columns):
        table.add_column(column, justify="right" if number else "left")
    for row in sheet.rows:
        table.add_row(*row)
    console = Terminal(file=StringIO(), width=width, color_system=None)
    console.print(table)
    for note in sheet.notes:
        console.print(f"- {note}")
    assert isinstance(console.file, StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().split("\n"))
