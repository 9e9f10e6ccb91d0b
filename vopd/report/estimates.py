"""The figures of a comparison: per method accuracy, change against base and against the best, corrected p-values.

A row is one recipe over its training seeds. Intervals resample seeds and questions (`statistics.two_level`); with one
seed they speak of questions alone and agree with the run's own summary. Changes are paired by question, and by seed
where two methods meet. "Base" is the model before training; a method's change is taken against the answers that the
base model gave in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vopd.evaluation import statistics
from vopd.evaluation.records import Record, rates, select
from vopd.evaluation.statistics import Difference, Interval
from vopd.report.consistency import label
from vopd.report.run_folders import KINDS, METHODS, Run
from vopd.report.run_summary import HOLD_OUT, TEST

MEASURES = ("full", "crop", "gap", "hold-out")
Values = dict[int, dict[str, float]]
"""Training seed -> question id -> value."""


@dataclass(frozen=True)
class Group:
    """One recipe: its runs by seed, under the name that its row has."""

    name: str
    kind: str
    runs: list[Run]


@dataclass(frozen=True)
class Measure:
    """One measure after training, its change against base, and the p-value of that corrected over the table."""

    after: Interval
    change: Difference
    p_holm: float


@dataclass(frozen=True)
class Against:
    """A row's full view minus another row's, paired by question and seed. `seeds`: those that both have."""

    name: str
    seeds: list[int]
    difference: Difference
    p_holm: float


@dataclass(frozen=True)
class Failures:
    """Shares of the full-view test answers after training: unparsed, cut off at the limit; and their mean length."""

    unparsed: float
    truncated: float
    response_tokens: float


@dataclass(frozen=True)
class Row:
    """One method. `rank` counts from 1 by the mean on the full view, base included; equal means share one.

    gap_closed: share of base's gap that the full view gained, None without a gap. `against`: the best method of the
    table, or for an ablation or control the recipe that it varies; None for that one itself and where no seed is
    shared. views: what else was answered (such as what a hinted teacher sees): name -> before and after.
    """

    name: str
    seeds: list[int]
    measures: dict[str, Measure]
    gap_closed: Interval | None
    rank: int
    against: Against | None
    failures: Failures
    views: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Base:
    """The model before training. `answered`: how many different sets of answers it gave in the runs."""

    measures: dict[str, Interval]
    answered: int
    rank: int
    failures: Failures


@dataclass(frozen=True)
class Table:
    """All rows of a kind, best first; `questions`: how many there are behind each measure; `detectable`: the smallest
    true change on the full view that the first row's questions would show with 80% power."""

    kind: str
    base: Base
    rows: list[Row]
    questions: dict[str, int]
    detectable: float


def group(runs: Sequence[Run]) -> list[Group]:
    """Runs by recipe, seeds in order; recipes in the order of METHODS, then KINDS, then of the runs given."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        found.setdefault((run.kind, label(run, runs)), []).append(run)
    order = [METHODS, *KINDS]
    keys = sorted(found, key=lambda key: order.index(key[0]))
    return [Group(name, kind, sorted(found[kind, name], key=lambda r: r.seed)) for kind, name in keys]


def compare(groups: Sequence[Group], seen: Callable[[], Any] = lambda: None) -> list[Table]:
    """One table for each kind that has runs. `seen` is called after each row.

    Raises:
        UserError: a split that has no answers in a view.
    """
    kinds = [kind for kind in (METHODS, *KINDS) if any(g.kind == kind for g in groups)]
    base = _Base([run for g in groups for run in g.runs])
    return [_table(kind, groups, base, seen) for kind in kinds]


def values(run: Run, when: str, measure: str) -> dict[str, float]:
    """Question id -> correct (1), incorrect (0), or their difference for the gap; empty where nothing was asked."""
    records = run.before if when == "before" else run.after
    if measure == "gap":
        full, crop = _right(records, "full", TEST), _right(records, "crop", TEST)
        return {i: crop[i] - full[i] for i in full if i in crop}
    view, split = {"full": ("full", TEST), "crop": ("crop", TEST), "hold-out": ("full", HOLD_OUT)}[measure]
    return _right(records, view, split)


def _right(records: Sequence[Record], view: str, split: str) -> dict[str, float]:
    return {r.id: float(r.correct) for r in records if r.view == view and r.split == split}


def common(sides: Sequence[Values]) -> list[Values]:
    """The sides with the questions that all of their seeds answered: all of them, where the runs compare."""
    maps = [answers for side in sides for answers in side.values()]
    shared = set.intersection(*(set(m) for m in maps)) if maps else set()
    return [{s: {i: m[i] for i in m if i in shared} for s, m in side.items()} for side in sides]


def interval(sides: Values, measure: str) -> Interval:
    """Mean with its 95% interval; Wilson's for one seed of correct and incorrect answers."""
    (sides,) = common([sides])
    if len(sides) == 1 and measure != "gap":
        return statistics.accuracy(_verdicts(sides))
    found = statistics.two_level(sides)
    return Interval(found.value, found.low, found.high)


def difference(first: Values, second: Values, measure: str) -> Difference:
    """second - first, paired; McNemar's exact test for one seed of correct and incorrect answers."""
    first, second = common([first, second])
    if len(first) == 1 and measure != "gap":
        return statistics.paired_difference(_verdicts(first), _verdicts(second))
    return statistics.two_level({s: statistics.answer_differences(first[s], second[s]) for s in second})


def _verdicts(one_seed: Values) -> dict[str, bool]:
    (answers,) = one_seed.values()
    return {i: bool(right) for i, right in answers.items()}


def failures(runs: Sequence[Run], when: str = "after") -> Failures:
    """Means over runs, of the full view's test answers."""
    parts = [
        rates(select(run.before if when == "before" else run.after, view="full", split=TEST)) for run in runs
    ]
    return Failures(
        *(
            sum(getattr(p, f) for p in parts) / len(parts)
            for f in ("unparsed", "truncated", "response_tokens")
        )
    )


class _Base:
    """The different sets of answers that the base model gave; equal ones count once."""

    def __init__(self, runs: Sequence[Run]) -> None:
        different: dict[tuple[Any, ...], Run] = {}
        for run in runs:
            key = tuple(
                sorted((r.split, r.view, r.id, r.correct) for r in run.before if r.view in ("full", "crop"))
            )
            different.setdefault(key, run)
        self.runs = list(different.values())

    def measures(self) -> dict[str, Interval]:
        found = {m: {n: values(run, "before", m) for n, run in enumerate(self.runs)} for m in MEASURES}
        return {m: interval(side, m) for m, side in found.items() if all(side.values())}


def _sides(runs: Sequence[Run], measure: str) -> tuple[Values, Values]:
    before, after = ({run.seed: values(run, when, measure) for run in runs} for when in ("before", "after"))
    return before, after


def _table(kind: str, groups: Sequence[Group], base: _Base, seen: Callable[[], Any]) -> Table:
    own = [g for g in groups if g.kind == kind]
    measured: dict[str, dict[str, tuple[Interval, Difference]]] = {}
    for g in own:
        measured[g.name] = _measured(g)
        seen()
    corrected = statistics.holm(
        {f"{name}\0{m}": d.p_value for name, found in measured.items() for m, (_, d) in found.items()}
    )
    base_measures = base.measures()
    means = {name: found["full"][0].value for name, found in measured.items()}
    against = _against(kind, own, groups, means)
    everyone = [*means.values(), base_measures["full"].value]
    rows = [
        Row(
            name=g.name,
            seeds=[run.seed for run in g.runs],
            measures={
                m: Measure(i, d, corrected[f"{g.name}\0{m}"]) for m, (i, d) in measured[g.name].items()
            },
            gap_closed=_gap_closed(g),
            rank=_rank(means[g.name], everyone),
            against=against.get(g.name),
            failures=failures(g.runs),
            views=_other_views(g.runs),
        )
        for g in sorted(own, key=lambda g: -means[g.name])
    ]
    return Table(
        kind=kind,
        base=Base(
            base_measures,
            len(base.runs),
            _rank(base_measures["full"].value, everyone),
            failures(base.runs, "before"),
        ),
        rows=rows,
        questions={m: len(values(own[0].runs[0], "after", m)) for m in base_measures},
        detectable=_detectable(next(g for g in own if g.name == rows[0].name)),
    )


def _measured(g: Group) -> dict[str, tuple[Interval, Difference]]:
    found = {}
    for measure in MEASURES:
        before, after = _sides(g.runs, measure)
        if all(after.values()) and all(before.values()):
            found[measure] = interval(after, measure), difference(before, after, measure)
    return found


def _rank(value: float, everyone: Sequence[float]) -> int:
    return 1 + sum(other > value + 1e-12 for other in everyone)


def _gap_closed(g: Group) -> Interval | None:
    before, after = _sides(g.runs, "full")
    gap, _ = _sides(g.runs, "gap")
    before, after, gap = common([before, after, gap])
    gained = {s: statistics.answer_differences(before[s], after[s]) for s in after}
    return statistics.two_level_ratio(gained, gap)


def _against(
    kind: str, own: Sequence[Group], groups: Sequence[Group], means: Mapping[str, float]
) -> dict[str, Against]:
    """Per row the difference to the best (methods) or to the recipe that it varies (the others)."""
    methods = {g.name: g for g in groups if g.kind == METHODS}
    found: dict[str, tuple[str, list[int], Difference]] = {}
    for g in own:
        best = max(means, key=lambda name: means[name])
        other = methods.get(best) if kind == METHODS else methods.get(_varied(g.name, list(methods)))
        if other is None or other is g:
            continue
        seeds = sorted({r.seed for r in g.runs} & {r.seed for r in other.runs})
        if seeds:
            sides = [
                {r.seed: values(r, "after", "full") for r in s.runs if r.seed in seeds} for s in (other, g)
            ]
            if all(common(sides)[0].values()):
                found[g.name] = other.name, seeds, difference(sides[0], sides[1], "full")
    corrected = statistics.holm({name: d.p_value for name, (*_, d) in found.items()})
    return {name: Against(*parts, p_holm=corrected[name]) for name, parts in found.items()}


def _varied(name: str, methods: Sequence[str]) -> str:
    """The recipe that an ablation or control varies: the longest recipe name that its own begins with."""
    return max((m for m in methods if name.startswith(f"{m}_")), key=len, default="")


def _other_views(runs: Sequence[Run]) -> dict[str, tuple[float, float]]:
    def mean(when: str, view: str) -> float:
        parts = [select(run.before if when == "before" else run.after, view=view, split=TEST) for run in runs]
        return sum(rates(part).accuracy for part in parts) / len(parts)

    sets = [
        {r.view for r in records if r.split == TEST} for run in runs for records in (run.before, run.after)
    ]
    return {
        v: (mean("before", v), mean("after", v)) for v in sorted(set.intersection(*sets) - {"full", "crop"})
    }


def _detectable(g: Group) -> float:
    before, after = common(list(_sides(g.runs, "full")))
    means = [
        {i: sum(answers[i] for answers in side.values()) / len(side) for i in next(iter(side.values()))}
        for side in (before, after)
    ]
    return statistics.minimum_detectable_difference(means[0], means[1])
