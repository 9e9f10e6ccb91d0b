"""A comparison from its run folders: runs read, checked for comparability, figures computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from vopd.errors import UserError
from vopd.report import consistency, estimates, run_folders
from vopd.report import token_budget as tokens
from vopd.report.estimates import Group, Row, Table
from vopd.report.run_folders import Broken, Run
from vopd.report.token_budget import EqualTokens


@dataclass(frozen=True)
class Comparison:
    """All that the pages are written from; groups in the order of the tables' rows, `tokens` of the first table's.

    mixed: sentences on what differs between runs that were to be compared nevertheless; empty where all are comparable.
    """

    groups: list[Group]
    tables: list[Table]
    tokens: EqualTokens
    broken: list[Broken]
    mixed: list[str]

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    @property
    def main(self) -> Table:
        """The table of methods; that of ablations or controls where only such were given."""
        return self.tables[0]

    @property
    def rows(self) -> dict[str, Row]:
        return {row.name: row for table in self.tables for row in table.rows}


def make(paths: Sequence[Path], mixed: bool = False) -> Comparison:
    """Read and compute.

    Raises:
        UserError: no run could be used, or runs are not comparable and `mixed` is not set.
    """
    folders = run_folders.find(paths)
    with tqdm(total=len(folders), desc="reading runs", unit="run", disable=None) as bar:
        found, broken = run_folders.read_all(folders, bar.update)
    if not found:
        raise UserError(f"None of the {len(folders)} runs can be used; the first: {broken[0].why}")
    differences = consistency.check(found, mixed)
    groups = estimates.group(found)
    with tqdm(total=len(groups), desc="intervals", unit="method", disable=None) as bar:
        tables = estimates.compare(groups, bar.update)
    order = [row.name for table in tables for row in table.rows]
    groups.sort(key=lambda g: order.index(g.name))
    main = [g for g in groups if g.kind == tables[0].kind]
    return Comparison(groups, tables, tokens.equal_tokens(main), broken, differences)
