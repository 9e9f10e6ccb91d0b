"""A finished run in one page: accuracy before and after, paired changes, tokens and seconds.

Reads records/before.jsonl, records/after.jsonl and metrics.jsonl of a run folder, writes summary.json there and
returns the same facts for the terminal. Nothing is recomputed from the model; every figure can be traced to a
record.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from vopd.common.collapse import FLAGS
from vopd.common.files import write_text
from vopd.common.terminal import Terminal
from vopd.errors import UserError
from vopd.evaluation import statistics
from vopd.evaluation.records import Record, answers, rates_by, read_packed, read_records, select
from vopd.evaluation.statistics import Difference, Interval

TEST, HOLD_OUT = "test", "holdout"


@dataclass(frozen=True)
class Row:
    """One row of the table: an accuracy or the gap, before and after training, and the paired change."""

    name: str
    questions: int
    before: Interval
    after: Interval
    change: Difference
    p_holm: float
    """p-value of the change, corrected over the table's rows."""


@dataclass(frozen=True)
class Cost:
    """What the training took; seconds in all and by phase (phases may nest).

    Prompts and rollouts are those trained on; those discarded by a group filter are counted beside them, and their
    tokens are part of `tokens_generated`. `rows_trained` of the rollouts entered a loss. `tokens_scored`: prompt and
    response tokens that teachers and references read.
    """

    updates: int
    updates_empty: int
    updates_skipped: int
    prompts: int
    prompts_thrown: int
    rollouts: int
    rollouts_thrown: int
    rows_trained: int
    kept_share: float
    tokens_generated: int
    tokens_thrown: int
    tokens_scored: int
    seconds: float
    seconds_by_phase: dict[str, float]


@dataclass(frozen=True)
class Summary:
    """The facts of one run; accuracies and changes are fractions."""

    rows: list[Row]
    gap_closed: Interval | None
    """(full after - full before) / (crop before - full before); None where the base model had no gap."""
    minimum_detectable: float
    """Smallest true change on the full view that these questions would show with 80% power."""
    cost: Cost
    metrics: dict[str, dict[str, float]]
    """First and last value of every number in metrics.jsonl."""
    rates: dict[str, dict[str, dict[str, float]]]
    """before/after -> "split/view" and "split/view/family" -> accuracy, truncated, unparsed, response_tokens."""
    collapse: dict[str, list[int]]
    """Flag of `vopd.common.collapse` -> the steps at which it was up."""
    torn_lines: int
    run: dict[str, Any]
    """What the caller passed: code version, data hash, settings."""


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl by step, a repeated step's (after a resume) last line; a torn last line is dropped.

    UserError for a missing file, no complete line, or a line that is not a JSON object with a step.
    """
    path = run_dir / "metrics.jsonl"
    try:
        content = read_packed(path)
    except FileNotFoundError as error:
        raise UserError(f"There is no {path}; the run has not trained.") from error
    steps: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            values = json.loads(line)
            steps[int(values["step"])] = values
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"Line {number} of {path} is not a JSON object with a 'step'.") from error
    if not steps:
        raise UserError(f"{path} holds no complete line; the run has not finished a step.")
    return [steps[step] for step in sorted(steps)]


def summarise(run_dir: Path, extra: Mapping[str, Any]) -> Summary:
    """Sum up a run folder, write its summary.json and return the summary.

    extra: facts the records do not hold (code version, data hash, settings); stored under "run".
    UserError for missing or broken files and for records that do not pair up.
    """
    files = {when: read_records(run_dir / "records" / f"{when}.jsonl") for when in ("before", "after")}
    records = {when: file.records for when, file in files.items()}
    metrics = read_metrics(run_dir)
    full = {when: _answers(records, when, "full", TEST) for when in records}
    summary = Summary(
        rows=_rows(records),
        gap_closed=statistics.gap_closed(
            full["before"], full["after"], _answers(records, "before", "crop", TEST)
        ),
        minimum_detectable=statistics.minimum_detectable_difference(full["before"], full["after"]),
        cost=_cost(metrics),
        metrics=_first_and_last(metrics),
        rates={when: _rates(r) for when, r in records.items()},
        collapse={
            flag: [int(line["step"]) for line in metrics if line.get(f"collapse/{flag}")] for flag in FLAGS
        },
        torn_lines=sum(file.torn for file in files.values()),
        run=dict(extra),
    )
    text = json.dumps(as_json(summary), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(run_dir / "summary.json", f"{text}\n", sync=True)
    return summary


def _answers(records: Mapping[str, Sequence[Record]], when: str, view: str, split: str) -> dict[str, bool]:
    found = answers(select(records[when], view=view, split=split))
    if not found:
        raise UserError(f"records/{when}.jsonl has no answers to split '{split}' in view '{view}'.")
    return found


def _rows(records: Mapping[str, Sequence[Record]]) -> list[Row]:
    def pair(view: str, split: str) -> tuple[dict[str, bool], dict[str, bool]]:
        return _answers(records, "before", view, split), _answers(records, "after", view, split)

    full, crop = pair("full", TEST), pair("crop", TEST)
    gaps = [statistics.answer_differences(f, c, ("full", "crop")) for f, c in zip(full, crop, strict=True)]
    gap_change = statistics.answer_differences(gaps[0], gaps[1], ("before", "after"))
    found: list[tuple[str, int, Interval, Interval, Difference]] = [
        _accuracy_row("full", *full),
        _accuracy_row("crop", *crop),
        (
            "gap",
            len(gap_change),
            statistics.gap(full[0], crop[0]),
            statistics.gap(full[1], crop[1]),
            statistics.two_level({0: gap_change}),
        ),
    ]
    if any(select(r, split=HOLD_OUT) for r in records.values()):  # a data set need not have one
        found.append(_accuracy_row("hold-out", *pair("full", HOLD_OUT)))
    corrected = statistics.holm({name: change.p_value for name, *_, change in found})
    return [Row(*row, p_holm=corrected[row[0]]) for row in found]


def _accuracy_row(
    name: str, before: Mapping[str, bool], after: Mapping[str, bool]
) -> tuple[str, int, Interval, Interval, Difference]:
    change = statistics.paired_difference(before, after, names=(f"{name} before", f"{name} after"))
    return name, len(before), statistics.accuracy(before), statistics.accuracy(after), change


def _cost(metrics: Sequence[Mapping[str, Any]]) -> Cost:
    phases: dict[str, float] = {}
    for line in metrics:
        for key, value in line.items():
            if key.startswith("seconds/"):
                phase = key.removeprefix("seconds/")
                phases[phase] = phases.get(phase, 0.0) + float(value)
    # Where the trainer times the whole step, the other phases are inside it.
    seconds = phases["step"] if "step" in phases else sum(phases.values())

    def total(*names: str) -> int:
        return round(sum(line.get(name, 0) for line in metrics for name in names))

    rollouts = total("rollouts")
    rows = round(sum(line.get("update_rows", line.get("rollouts", 0)) for line in metrics))
    return Cost(
        updates=round(sum(line.get("updates", 1) for line in metrics)),
        updates_empty=sum(line.get("empty_updates", 0) > 0 for line in metrics),
        updates_skipped=sum(line.get("skipped_updates", 0) > 0 for line in metrics),
        prompts=total("prompts"),
        prompts_thrown=total("prompts_evicted", "prompts_surplus"),
        rollouts=rollouts,
        rollouts_thrown=total("rollouts_evicted", "rollouts_surplus"),
        rows_trained=rows,
        kept_share=rows / rollouts if rollouts else 0.0,
        tokens_generated=total("tokens_generated"),
        tokens_thrown=total("tokens_evicted", "tokens_surplus"),
        tokens_scored=total("scorer_tokens"),
        seconds=seconds,
        seconds_by_phase=phases,
    )


def _first_and_last(metrics: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    first, last = metrics[0], metrics[-1]
    names = [k for k, v in last.items() if isinstance(v, int | float) and not k.startswith("seconds/")]
    return {k: {"first": float(first.get(k, math.nan)), "last": float(last[k])} for k in names}


def _rates(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    groups = {**rates_by(records, ["split", "view"]), **rates_by(records, ["split", "view", "family"])}
    return {"/".join(key): dataclasses.asdict(group) for key, group in groups.items()}


def as_json(value: Any) -> Any:
    """Plain JSON values of a summary; numbers that are not finite become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def percent(interval: Interval, signed: bool = False) -> str:
    """ "70.6 [66.1, 74.8]", in points."""
    form = "{:+.1f}" if signed else "{:.1f}"
    value, low, high = (form.format(100 * x) for x in (interval.value, interval.low, interval.high))
    return f"{value} [?, ?]" if math.isnan(interval.low) else f"{value} [{low}, {high}]"


def p_text(p_value: float) -> str:
    """A p-value to two digits, "<0.001" below that."""
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}" if p_value < 0.1 else f"{p_value:.2f}"


def accuracy_table(rows: Sequence[Row], title: str) -> Table:
    """The rows as a rich table, in points with 95% intervals."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        title=title,
        title_justify="left",
        title_style="bold",
    )
    table.add_column("accuracy, %", no_wrap=True)
    for name in ("before", "after", "paired change", "p (Holm)", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            percent(row.before, signed=row.name == "gap"),
            percent(row.after, signed=row.name == "gap"),
            percent(row.change, signed=True),
            p_text(row.p_holm),
            f"{row.questions:,}",
        )
    return table


def to_text(*parts: Table | str) -> str:
    """Render tables and lines as plain text, 100 columns wide."""
    console = Terminal(file=StringIO(), width=100, color_system=None)
    for part in parts:
        console.print(part)
    assert isinstance(console.file, StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().split("\n"))


def render(summary: Summary) -> str:
    """The small table for the terminal, plain text."""
    cost = summary.cost
    phases = sorted((p for p in cost.seconds_by_phase.items() if p[0] != "step"), key=lambda p: -p[1])[:5]
    tests = {when: summary.rates[when][f"{TEST}/full"] for when in ("before", "after")}
    lines = [
        "",
        f"gap closed          {_closed(summary.gap_closed)}",
        f"detectable change   {100 * summary.minimum_detectable:.1f} points on full (80% power)",
        "truncated, unparsed "
        + "; ".join(f"{w} {100 * r['truncated']:.1f}%, {100 * r['unparsed']:.1f}%" for w, r in tests.items())
        + " (full)",
        f"training            {cost.updates:,} updates, {cost.rollouts:,} rollouts, "
        f"{cost.tokens_generated:,} generated tokens, {cost.seconds:,.0f} s",
        f"                    {cost.prompts:,} prompts, {100 * cost.kept_share:.0f}% of rollouts in a loss, "
        f"{cost.tokens_thrown:,} tokens discarded, {cost.tokens_scored:,} scored",
        "seconds by phase    " + ", ".join(f"{name} {value:,.0f}" for name, value in phases),
    ]
    for flag, steps in summary.collapse.items():
        if steps:
            lines.append(f"COLLAPSE ({flag})".ljust(20) + f"at {len(steps)} steps, first at {steps[0]}")
    if summary.torn_lines:
        lines.append(f"dropped             {summary.torn_lines} record lines cut short by an interruption")
    return to_text(accuracy_table(summary.rows, "Before and after training (95% intervals)"), *lines)


def _closed(interval: Interval | None) -> str:
    return "no gap to close" if interval is None else f"{percent(interval)} % of the gap before training"
