"""The tables of a comparison as text: who wins, by how much, at what cost, with which settings, and what failed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from vopd.report import consistency, published
from vopd.report.comparison import Comparison
from vopd.report.estimates import MEASURES, Base, Group, Row, Table
from vopd.report.run_folders import METHODS, Run
from vopd.report.run_summary import p_text, percent
from vopd.report.text_table import Sheet

BASE = "base (before training)"
SIGNIFICANT = 0.05
TITLES = {METHODS: "Methods", "ablations": "Ablations", "controls": "Controls"}


def sheets(c: Comparison) -> list[Sheet]:
    """All tables in the order of the page; the first is the one a reader came for."""
    kinds = [sheet for table in c.tables for sheet in (_main(c, table), _changes(c, table))]
    main = [s for s in kinds if s.key.endswith(c.main.kind)]
    others = [s for s in kinds if s not in main]
    extra = [sheet for sheet in (_views(c),) if sheet.rows]
    return [
        *main, _tokens(c), _cost(c), _phases(c), _failures(c), *extra, _settings(c), *others,
        *published.sheets(c.rows, c.main.base), _runs(c),
    ]  # fmt: skip


def verdict(c: Comparison) -> str:
    """What a reader would conclude, in at most three sentences; every figure is in the tables."""
    best = c.main.rows[0]
    full = best.measures["full"]
    sentences = [
        f"{best.name} is highest on the full view with {100 * full.after.value:.1f}%, "
        f"{percent(full.change, signed=True)} points against base (p {p_text(full.p_holm)} after Holm)"
        + ("." if full.p_holm < SIGNIFICANT else ", which may be chance.")
    ]
    rivals = [row for row in c.main.rows[1:] if row.against is not None and row.against.name == best.name]
    alike = [row.name for row in rivals if row.against and row.against.p_holm >= SIGNIFICANT]
    behind = [row.name for row in rivals if row.name not in alike]
    if behind:
        sentences.append(f"Significantly below it: {', '.join(behind)}.")
    if alike:
        sentences.append(f"Not significantly different from it: {', '.join(alike)}.")
    return " ".join(sentences)


# ---- accuracy -------------------------------------------------------------------------------------------------------


def _main(c: Comparison, table: Table) -> Sheet:
    measures = [m for m in MEASURES if m in table.base.measures]
    other = "best" if table.kind == METHODS else "the recipe it varies"
    return Sheet(
        key=f"accuracy-{table.kind}",
        title=f"{TITLES[table.kind]}: accuracy in % after training, 95% intervals over seeds and questions",
        columns=[
            "method",
            "seeds",
            *measures,
            "full, change",
            "p (Holm)",
            f"full, to {other}",
            "p (Holm)",
            "rank",
        ],
        rows=[
            *([_accuracy(row, measures) for row in table.rows if row.rank <= table.base.rank]),
            _base(table.base, measures),
            *([_accuracy(row, measures) for row in table.rows if row.rank > table.base.rank]),
        ],
        notes=_accuracy_notes(c, table),
    )


def _base(base: Base, measures: Sequence[str]) -> list[str]:
    cells = [percent(base.measures[m], signed=m == "gap") for m in measures]
    return [BASE, "-", *cells, "-", "-", "-", "-", str(base.rank)]


def _accuracy(row: Row, measures: Sequence[str]) -> list[str]:
    full = row.measures["full"]
    cells = [
        percent(row.measures[m].after, signed=m == "gap") if m in row.measures else "-" for m in measures
    ]
    against = ["-", "-"]
    if row.against is not None:
        against = [percent(row.against.difference, signed=True), p_text(row.against.p_holm)]
    change = [percent(full.change, signed=True), p_text(full.p_holm)]
    return [row.name, _seeds(row.seeds), *cells, *change, *against, str(row.rank)]


def _seeds(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} ({', '.join(map(str, seeds))})"


def _accuracy_notes(c: Comparison, table: Table) -> list[str]:
    asked = ", ".join(f"{m} {n:,}" for m, n in table.questions.items() if m != "gap")
    few = min(len(row.seeds) for row in table.rows)
    notes = [
        f"Questions: {asked}. Gap: crop minus full view. Changes are against base, paired by question; p-values of "
        "changes are corrected over all methods and measures of this table, those of the comparison in the second "
        "column over its rows. With several seeds a p-value comes from 9,999 resamples and is at least 0.0002 before "
        "correction.",
        f"With these questions a true change of {100 * table.detectable:.1f} points on the full view would be seen "
        "with 80% power.",
    ]
    if few < 3:
        notes.append(
            f"At least one row has {few} seed{'s' if few > 1 else ''}: "
            + ("its interval says nothing about other seeds." if few == 1 else "the seeds' share is rough.")
        )
    else:
        notes.append("With few seeds their share of an interval is rough, and rather too small.")
    if table.base.answered > 1:
        notes.append(
            f"The base model gave {table.base.answered} different sets of answers in these runs (another machine or "
            "library); its row is their mean, and each run is compared with its own."
        )
    shared = [r for r in table.rows if r.against is not None and r.against.seeds != r.seeds]
    notes += [
        f"{r.name} and {r.against.name} share the seeds {', '.join(map(str, r.against.seeds))} alone; their difference "
        "is over those."
        for r in shared
        if r.against is not None
    ]
    if table.kind != METHODS:
        notes += _varied(table)
    return [*notes, *mixed_notes(c), *broken_notes(c)]


def mixed_notes(c: Comparison) -> list[str]:
    """That and how the runs differ, where the caller wanted them in one table nevertheless."""
    return [f"NOT COMPARABLE, put together on request: {sentence}" for sentence in c.mixed]


def broken_notes(c: Comparison) -> list[str]:
    """The runs that are missing from the table."""
    return [f"Left out: {broken.why}" for broken in c.broken]


def _varied(table: Table) -> list[str]:
    """One note for each recipe that rows of this table vary."""
    by: dict[str, list[str]] = {}
    for row in table.rows:
        if row.against is not None:
            by.setdefault(row.against.name, []).append(row.name)
    return [f"Compared with {recipe}: {', '.join(names)}." for recipe, names in by.items()]


def _changes(c: Comparison, table: Table) -> Sheet:
    measures = [m for m in MEASURES if m in table.base.measures]

    def cells(row: Row) -> list[str]:
        found = []
        for m in measures:
            measure = row.measures.get(m)
            found += [percent(measure.change, signed=True), p_text(measure.p_holm)] if measure else ["-", "-"]
        closed = "no gap" if row.gap_closed is None else percent(row.gap_closed)
        return [row.name, *found, closed]

    heads = [head for m in measures for head in (f"{m}, change", "p (Holm)")]
    return Sheet(
        key=f"changes-{table.kind}",
        title=f"{TITLES[table.kind]}: change against base in points, paired",
        columns=["method", *heads, "gap closed, %"],
        rows=[cells(row) for row in table.rows],
        notes=["Gap closed: what the full view gained, as a share of base's gap. A gap also shrinks when crops are "
               "read worse: look at the crop's change beside it."],
    )  # fmt: skip


def _tokens(c: Comparison) -> Sheet:
    found = c.tokens
    columns = ["method", "full", "crop"]
    notes = [f"No validation answers during training: {folder}." for folder in found.without]
    if found.tokens is None:
        return Sheet(
            "tokens",
            "Accuracy at equal generated tokens",
            columns,
            [],
            [f"Not shown: {found.why}. Runs with a smaller evaluate.every ask more often.", *notes],
        )
    ranked = sorted(found.full, key=lambda name: -found.full[name].value)
    return Sheet(
        key="tokens",
        title=f"Accuracy in % at {found.tokens:,} generated tokens, validation questions",
        columns=columns,
        rows=[
            [name, percent(found.full[name]), percent(found.crop[name]) if name in found.crop else "-"]
            for name in ranked
        ],
        notes=[
            "The largest number of tokens between two validation points of every run; between points values "
            "are interpolated. Discarded answers count. The validation questions are few: the intervals are wide.",
            *notes,
        ],
    )


# ---- cost -----------------------------------------------------------------------------------------------------------


def _mean(runs: Sequence[Run], of: Callable[[Run], Any], form: str = "{:,.0f}") -> str:
    """Mean over runs, with the range where they differ; "-" where a run did not record it."""
    numbers = [of(run) for run in runs]
    if any(n is None for n in numbers):
        return "-"
    low, high, mean = (form.format(n) for n in (min(numbers), max(numbers), sum(numbers) / len(numbers)))
    return mean if low == high else f"{mean} ({low} to {high})"


def _cost_of(key: str) -> Callable[[Run], Any]:
    return lambda run: run.cost.get(key)


def _seconds_of(phase: str) -> Callable[[Run], Any]:
    return lambda run: run.cost["seconds_by_phase"].get(phase, 0.0)


COSTS = {
    "updates": "updates", "prompts": "prompts", "discarded": "prompts_thrown", "rollouts": "rollouts",
    "in a loss": "rows_trained", "generated tokens": "tokens_generated", "of them discarded": "tokens_thrown",
    "scored tokens": "tokens_scored",
}  # fmt: skip


def _cost(c: Comparison) -> Sheet:
    def row(g: Group) -> list[str]:
        counts = [_mean(g.runs, _cost_of(key)) for key in COSTS.values()]
        return [
            g.name,
            *counts,
            _mean(g.runs, lambda run: run.cost["seconds"]),
            _mean(g.runs, lambda run: run.facts.get("wall_seconds")),
            _mean(g.runs, lambda run: run.facts.get("peak_memory_gib"), "{:.1f}"),
        ]

    return Sheet(
        key="cost",
        title="Cost of a run, mean over seeds (range)",
        columns=["method", *COSTS, "seconds, training", "seconds, whole run", "peak memory, GiB"],
        rows=[row(g) for g in c.groups],
        notes=[
            "Prompts and rollouts are those trained on; discarded: prompts dropped by a group filter. Scored "
            "tokens: prompt and response tokens that teachers and references read. The whole run holds start-up and "
            "both evaluations.",
            _machines(c.runs),
        ],
    )


def _machines(runs: Sequence[Run]) -> str:
    kinds = sorted({str(run.facts.get("machine", "a machine that was not recorded")) for run in runs})
    if len(kinds) == 1:
        return f"Seconds are of {kinds[0]}, and depend on what ran beside it."
    return f"Seconds are of different machines and not comparable: {'; '.join(kinds)}."


def _phases(c: Comparison) -> Sheet:
    totals: dict[str, float] = {}
    for run in c.runs:
        for phase, seconds in run.cost["seconds_by_phase"].items():
            totals[phase] = totals.get(phase, 0.0) + seconds
    phases = sorted((p for p in totals if p != "step"), key=lambda p: -totals[p])[:8]

    def row(g: Group) -> list[str]:
        return [
            g.name,
            *(_mean(g.runs, _seconds_of(p)) for p in phases),
        ]

    return Sheet(
        key="phases",
        title="Seconds by phase, mean over seeds (range)",
        columns=["method", *phases],
        rows=[row(g) for g in c.groups],
        notes=["Phases as the trainer names them, the largest ones; they may be nested."],
    )


# ---- failures, settings, provenance ---------------------------------------------------------------------------------


def _failures(c: Comparison) -> Sheet:
    def cells(name: str, item: Row | Base, flags: str, judged: str) -> list[str]:
        f = item.failures
        return [
            name, f"{100 * f.unparsed:.1f}", f"{100 * f.truncated:.1f}", judged, f"{f.response_tokens:.1f}", flags,
        ]  # fmt: skip

    rows = [cells(BASE, c.main.base, "-", _judge(c.runs))]
    by_name = {g.name: g for g in c.groups}
    for table in c.tables:
        for row in table.rows:
            runs = by_name[row.name].runs
            rows.append(cells(row.name, row, _flags(runs), _judge(runs)))
    return Sheet(
        key="failures",
        title="What failed: full view of the test questions, % of answers",
        columns=[
            "method",
            "unparsed",
            "truncated",
            "judge failed",
            "tokens an answer",
            "collapse flags in training",
        ],
        rows=rows,
        notes=[
            "Unparsed: the parser found no answer, counted as incorrect. Truncated: no end within the limit."
        ],
    )


def _judge(runs: Sequence[Run]) -> str:
    names = {str(consistency.scorer(run)["judge"]) for run in runs}
    return "no judge" if names == {"none"} else ", ".join(sorted(names))


def _flags(runs: Sequence[Run]) -> str:
    parts = [
        f"{flag}: seed {run.seed} from step {steps[0]} ({len(steps)} steps)"
        for run in runs
        for flag, steps in run.collapse.items()
        if steps
    ]
    return "; ".join(parts) or "none"


def _views(c: Comparison) -> Sheet:
    rows = [
        [row.name, view, f"{100 * before:.1f}", f"{100 * after:.1f}"]
        for table in c.tables
        for row in table.rows
        for view, (before, after) in row.views.items()
    ]
    return Sheet(
        key="views",
        title="What a method's teacher sees, answered by itself: accuracy in %",
        columns=["method", "view", "before", "after"],
        rows=rows,
        notes=[
            "Such as the question with its answer told: how well the hint works before judging a method by it."
        ],
    )


SETTINGS = {
    "learning rate": "train.lr", "warm-up": "train.warmup_steps", "updates": "train.steps",
    "prompts": "train.prompts", "rollouts": "train.rollouts", "longest answer": "rollout.max_response_tokens",
}  # fmt: skip


def _settings(c: Comparison) -> Sheet:
    names = {
        "anchor": "anchor (teacher, KL)",
        "objective": "objective",
        "normalisation": "normalisation",
        "clip": "clip",
    }

    def row(g: Group) -> list[str]:
        method, settings = g.runs[0].facts["method"], consistency.settings_of(g.runs[0])
        return [
            g.name,
            *(str(method.get(key, "-")) for key in names),
            *(f"{settings.get(key, '-')}" for key in SETTINGS.values()),
        ]

    return Sheet(
        key="settings",
        title="Settings",
        columns=["method", *names.values(), *SETTINGS],
        rows=[row(g) for g in c.groups],
        notes=["All settings of a run are in its summary.json under run.settings."],
    )


def _runs(c: Comparison) -> Sheet:
    top = os.path.commonpath([run.folder.absolute().parent for run in c.runs])

    def row(run: Run) -> list[str]:
        full = 100 * sum(r.correct for r in run.after if (r.view, r.split) == ("full", "test"))
        asked = sum((r.view, r.split) == ("full", "test") for r in run.after)
        return [
            os.path.relpath(run.folder.absolute(), top), run.recipe, str(run.seed), f"{full / asked:.1f}",
            _hash(run.facts["code"]), _hash(run.facts["data_hash"]), _hash(run.facts["model_hash"]),
            _hash(str(consistency.scorer(run)["code"])),
        ]  # fmt: skip

    return Sheet(
        key="runs",
        title="The runs",
        columns=["folder", "recipe", "seed", "full, %", "commit", "data", "base model", "parser"],
        rows=[row(run) for run in c.runs],
        notes=broken_notes(c),
    )


def _hash(text: str) -> str:
    commit, _, changes = text.partition("+")
    short = commit[:10] if len(commit) >= 40 else commit
    return f"{short}+{changes}" if changes else short
