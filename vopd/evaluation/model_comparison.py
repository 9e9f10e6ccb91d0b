"""Two models on the same questions: `vopd compare-models FIRST SECOND [scorer=official] [judge=true]`.

FIRST and SECOND are folders that `vopd evaluate` wrote (runs/evaluation/<model>), or several joined by
commas: the training seeds of one method, in the same order on both sides, which are resampled as a second level.
Differences are second minus first, paired by question, with 95% intervals, p-values, and p-values corrected over the
table (Holm). MDD is the smallest true difference that such questions would show with 80% power. judge=true takes the
verdicts that a judge left beside the records.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from vopd.common.command import reports_errors
from vopd.common.terminal import Terminal
from vopd.errors import UserError
from vopd.evaluation import benchmark, judge, metrics, statistics
from vopd.evaluation.records import Record, answers, read_answers, select
from vopd.evaluation.results import plain


@dataclass(frozen=True)
class Row:
    """One comparison. first, second: mean accuracies; difference with limits and p-value; holm over the table."""

    name: str
    questions: int
    first: float
    second: float
    difference: statistics.Difference
    detectable: float
    holm: float


def compare(
    first: Sequence[Path], second: Sequence[Path], scorer: str = "strict", judged: bool = False
) -> list[Row]:
    """All benchmarks and views that both sides have.

    Raises:
        UserError: another number of seeds on one side, nothing in common, or other questions answered.
    """
    if len(first) != len(second):
        raise UserError(
            f"{len(first)} folders on one side and {len(second)} on the other; give one for each seed."
        )
    sides = [[_scored(folder, scorer, judged) for folder in side] for side in (first, second)]
    common = sorted(set.intersection(*(set(run) for side in sides for run in side)))
    if not common:
        raise UserError(
            f"{first[0]} and {second[0]} have no benchmark and view in common; evaluate both on one."
        )
    found = []
    for name in common:
        runs = [[run[name] for run in side] for side in sides]
        found.append(_row(" ".join(name), runs[0], runs[1], metrics.clusters(runs[0][0])))
        if benchmark.find(name[0])[1].metrics.pairs:
            paired = [[metrics.pairs(run) for run in side] for side in runs]
            found.append(_row_of(f"{' '.join(name)} pairs", paired[0], paired[1], None))
    corrected = statistics.holm({name: difference.p_value for name, *_, difference, _ in found})
    return [Row(*row, holm=corrected[row[0]]) for row in found]


def _scored(folder: Path, scorer: str, judged: bool) -> dict[tuple[str, str], list[Record]]:
    """(benchmark, view) -> records, parsed again by the current parser."""
    found: dict[tuple[str, str], list[Record]] = {}
    for file in sorted(folder.glob("*/records.jsonl")):
        name, spec = benchmark.find(file.parent.name)
        answered = read_answers(file).records
        replies = judge.read_replies(file.with_name("judge.jsonl")) if judged else {}
        if judged and scorer == "official":
            _check_asked(metrics.parsed(answered, spec, scorer), replies, file)
        records = metrics.score(answered, spec, scorer, replies).records
        for view in ("full", "crop"):
            if part := select(records, view=view):
                found[name, view] = part
    if not found:
        raise UserError(f"{folder}: holds no records of an evaluation; give the folder of a model.")
    return found


def _check_asked(records: Sequence[Record], replies: judge.Replies, file: Path) -> None:
    """Refuse records of which the judge saw not all that the official scorer asks: they would all count as "no"."""
    asks = [ask for record in records if (ask := judge.ask_of(record, "official"))]
    if absent := sum(ask.key not in replies for ask in asks):
        raise UserError(
            f"{file}: the judge has not seen {absent} of {len(asks)} responses; run vopd evaluate with scorer=official "
            "and this judge first."
        )


_Found = tuple[str, int, float, float, statistics.Difference, float]


def _row(
    name: str, first: list[list[Record]], second: list[list[Record]], groups: dict[str, str] | None
) -> _Found:
    return _row_of(name, [answers(r) for r in first], [answers(r) for r in second], groups)


def _row_of(
    name: str,
    first: list[dict[str, bool]],
    second: list[dict[str, bool]],
    groups: Mapping[str, str] | None,
) -> _Found:
    ids = list(first[0])
    if len(first) == 1:
        difference = statistics.paired_difference(first[0], second[0], groups, names=("first", "second"))
    else:
        changes = {
            s: statistics.answer_differences(a, b) for s, (a, b) in enumerate(zip(first, second, strict=True))
        }
        difference = statistics.two_level(changes, groups)
    means = [{i: sum(run[i] for run in side) / len(side) for i in ids} for side in (first, second)]
    detectable = statistics.minimum_detectable_difference(means[0], means[1], groups)
    return name, len(ids), *(sum(m.values()) / len(ids) for m in means), difference, detectable  # type: ignore[return-value]


def table(rows: Sequence[Row], names: tuple[str, str], scorer: str) -> Table:
    """Rows in points (per cent)."""
    shown = Table(title=f"{plain(names[1])} minus {plain(names[0])}, scorer {scorer}", title_justify="left")
    columns = ("benchmark, view", "questions", "first", "second", "difference", "95%", "p", "p (Holm)", "MDD")
    for column in columns:
        shown.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        d = row.difference
        shown.add_row(
            row.name, str(row.questions), f"{100 * row.first:.1f}", f"{100 * row.second:.1f}", f"{100 * d.value:+.1f}",
            f"[{100 * d.low:+.1f}, {100 * d.high:+.1f}]", f"{d.p_value:.4f}", f"{row.holm:.4f}",
            f"{100 * row.detectable:.1f}" if row.detectable else "-",
        )  # fmt: skip
    return shown


@reports_errors()
def main(arguments: list[str]) -> int:
    """Exit code 0, 2 for bad input."""
    if len(arguments) < 2 or "--help" in arguments:
        print(__doc__)
        return 0
    options = {"scorer": "strict", "judge": "false"} | dict(
        argument.split("=", 1) for argument in arguments[2:] if "=" in argument
    )
    if set(options) != {"scorer", "judge"} or options["scorer"] not in metrics.SCORERS:
        raise UserError(
            f"'{' '.join(arguments[2:])}' is not understood; known are scorer=strict|official and judge=true."
        )
    first, second = ([Path(p) for p in side.split(",")] for side in arguments[:2])
    rows = compare(first, second, options["scorer"], options["judge"] == "true")
    console = Terminal()
    console = console if console.is_terminal else Terminal(width=140)
    alone = options["scorer"] == "official" and options["judge"] != "true"
    scorer = options["scorer"] + ", rules only" * alone
    console.print(table(rows, (first[0].name, second[0].name), scorer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
