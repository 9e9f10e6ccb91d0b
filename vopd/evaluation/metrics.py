"""From scored records to a benchmark's figures: plain accuracy with its interval, and its official metrics beside it.

All figures are fractions. What a benchmark reports is in its YAML file (`metrics`).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vopd.errors import UserError
from vopd.evaluation import judge, statistics
from vopd.evaluation.description import BY_GOLD, Benchmark, Mean
from vopd.evaluation.judge import Replies, State
from vopd.evaluation.records import Record, answers, mean_tokens
from vopd.evaluation.scoring import is_correct, parse_answer
from vopd.evaluation.scoring.official import is_right, parse_official

SCORERS = ("strict", "official")


@dataclass(frozen=True)
class Scored:
    """Records as one scorer counts them, with its judge. failed: responses that a judge gave no verdict to, which the
    strict scorer leaves out. open, turned: responses that the rules leave to a judge, and those that it found right."""

    records: list[Record]
    failed: int
    open: int
    turned: int


def score(records: Sequence[Record], spec: Benchmark, scorer: str, replies: Replies) -> Scored:
    """Read the raw responses again, so that records of any age are scored by one and the same rule.

    replies: what a judge said, none at all without a judge. What the judge has not come to is as good as failed: the
    official scorer counts it as a "no", as the published evaluation does; the strict one leaves it out.
    """
    kept: list[Record] = []
    states: Counter[State | None] = Counter()
    for record in parsed(records, spec, scorer):
        ask = judge.ask_of(record, scorer)
        if ask is not None and not replies:
            states[None] += 1
        elif ask is not None:
            state = judge.state(replies.get(ask.key), scorer)
            states[state] += 1
            if state == "failed" and scorer == "strict":
                continue
            record = dataclasses.replace(record, correct=state == "right")
        kept.append(record)
    return Scored(kept, states["failed"], states.total(), states["right"])


def parsed(records: Sequence[Record], spec: Benchmark, scorer: str) -> list[Record]:
    """The same responses, read by the present parser."""
    return [_parsed(record, spec, scorer) for record in records]


def _parsed(record: Record, spec: Benchmark, scorer: str) -> Record:
    kind, options = record.details["answer_type"], record.details["options"]
    if scorer == "official":
        # A benchmark of letters and texts is none of the letter benchmarks: its responses are read as texts.
        rule = "short" if spec.answer_type == BY_GOLD else kind
        result = parse_official(record.response, rule, options, lowercase_options=spec.lowercase_options)
        correct = is_right(result, record.response, record.gold, rule)
    else:
        result = parse_answer(record.response, kind, options)
        correct = is_correct(result, record.gold, kind)
    return dataclasses.replace(record, parsed=result.value, correct=correct)


def clusters(records: Sequence[Record]) -> dict[str, str] | None:
    """Question -> cluster, where the benchmark has clusters."""
    found = {r.id: str(r.details["cluster"]) for r in records if r.details.get("cluster") is not None}
    return found or None


def figures(records: Sequence[Record], spec: Benchmark) -> dict[str, Any]:
    """Figures of one view's scored records."""
    right, groups = answers(records), clusters(records)
    wanted = spec.metrics
    result: dict[str, Any] = {
        "questions": len(records),
        "accuracy": _interval(right, groups),
        "unparsed": sum(r.parsed is None for r in records) / len(records),
        "truncated": sum(r.truncated for r in records) / len(records),
        "response_tokens": None if math.isnan(tokens := mean_tokens(records)) else tokens,
        "seconds": sum(r.details["seconds"] for r in records) / len(records),
        "resized": _resized(records),
    }
    for group in wanted.per:
        result[f"by {group}"] = _per(records, [group])
    for name, mean in wanted.means().items():
        result[name] = _mean(records, mean, right, groups)
        result[f"{name}, parts"] = _per(records, mean.over, mean.name)
    if wanted.pairs:
        result["pair accuracy"] = _interval(pairs(records), None)
    if wanted.other_gold:
        corrected = [_by_other_gold(r) if r.id in wanted.other_gold else r for r in records]
        result["accuracy, corrected golds"] = _interval(answers(corrected), groups)
        if wanted.pairs:
            result["pair accuracy, corrected golds"] = _interval(pairs(corrected), None)
    if wanted.yes_no:
        result["yes/no"] = yes_no(records)
        for name, part in _split(records, ["category"]).items():
            result[f"yes/no, {name}"] = yes_no(part)
    return result


def _interval(right: Mapping[str, bool], groups: Mapping[str, str] | None) -> dict[str, float] | None:
    if not right:
        return None
    if groups is not None and len({groups[i] for i in right}) < 2:
        groups = None  # a handful of questions: nothing to resample
    return dataclasses.asdict(statistics.accuracy(right, groups))


def _split(
    records: Sequence[Record], over: Sequence[str], named: Callable[[str], str] = str
) -> dict[str, list[Record]]:
    """Records by the values of these groups; named: what a value counts as."""
    parts: dict[str, list[Record]] = {}
    for record in records:
        groups = record.details["groups"]
        if absent := [g for g in over if g not in groups]:
            raise UserError(
                f"The record of question '{record.id}' has no group '{absent[0]}', which the benchmark's metrics name; "
                "it was made by another version of the benchmark: give another out=... and ask again."
            )
        parts.setdefault(" / ".join(named(str(groups[g])) for g in over), []).append(record)
    return dict(sorted(parts.items()))


def _per(records: Sequence[Record], over: Sequence[str], named: Callable[[str], str] = str) -> dict[str, Any]:
    return {
        name: {"questions": len(part), **(_interval(answers(part), clusters(part)) or {})}
        for name, part in _split(records, over, named).items()
    }


def _mean(
    records: Sequence[Record], mean: Mean, right: Mapping[str, bool], groups: Mapping[str, str] | None
) -> dict[str, float] | None:
    """An average over groups with its interval; None while a weighted group has no answers yet."""
    strata = {r.id: name for name, part in _split(records, mean.over, mean.name).items() for r in part}
    present = sorted(set(strata.values()))
    weights = dict(mean.weights) or {name: 1 / len(present) for name in present}
    unknown = sorted(set(present) - set(weights))
    if unknown:
        raise UserError(
            f"metrics.mean.weights has no weight for {unknown[0]!r}; known are {', '.join(weights)}."
        )
    if set(weights) - set(present) or len(set((groups or strata).values())) < 2:
        return None
    return dataclasses.asdict(statistics.weighted_accuracy(right, strata, weights, groups))


def pairs(records: Sequence[Record]) -> dict[str, bool]:
    """Cluster -> whether all of its questions are correct; clusters of one question (its mate left out) are dropped."""
    found: dict[str, list[bool]] = {}
    for record in records:
        found.setdefault(str(record.details["cluster"]), []).append(record.correct)
    return {cluster: all(both) for cluster, both in found.items() if len(both) > 1}


def _by_other_gold(record: Record) -> Record:
    """A record of a question with two options, scored by the option that is not its gold.

    What counts for the published gold does not for the other one, whoever said so (the parser or a judge).
    """
    other = {"A": "B", "B": "A"}.get(record.gold.strip().strip("().").upper())
    if other is None:
        raise UserError(
            f"metrics.other_gold names question '{record.id}', whose gold '{record.gold}' is neither (a) nor (b)."
        )
    return dataclasses.replace(record, gold=other, correct=not record.correct and record.parsed == other)


def yes_no(records: Sequence[Record]) -> dict[str, float | None]:
    """Accuracy, precision, recall and F1 of "yes", and the share of "yes" among the predictions.

    An unparsed response is neither yes nor no. None where a figure is not defined. official_f1, official_yes_ratio: as
    the paper's evaluation counts them, in which whatever is not correct where the gold is "no" is a "yes", and the
    ratio is that of the golds.
    """
    says_yes = [r.parsed == "yes" for r in records]
    is_yes = [r.gold.strip().strip(".").lower() == "yes" for r in records]
    both = sum(said and true for said, true in zip(says_yes, is_yes, strict=True))
    hits = sum(r.correct for r, true in zip(records, is_yes, strict=True) if true)
    alarms = sum(not r.correct for r, true in zip(records, is_yes, strict=True) if not true)
    return {
        "accuracy": sum(r.correct for r in records) / len(records),
        "precision": both / sum(says_yes) if any(says_yes) else None,
        "recall": both / sum(is_yes) if any(is_yes) else None,
        "f1": _f1(both, sum(says_yes), sum(is_yes)),
        "yes_ratio": sum(says_yes) / len(records),
        "official_f1": _f1(hits, hits + alarms, sum(is_yes)),
        "official_yes_ratio": sum(is_yes) / len(records),
    }


def _f1(both: int, said: int, true: int) -> float | None:
    """Harmonic mean of both/said and both/true; None where nothing is true."""
    return 2 * both / (said + true) if true else None


def _resized(records: Sequence[Record]) -> float | None:
    """Share of pictures that the processor gave another size; None where that is not known."""
    sizes = [(r.details["image_in"], r.details["image_out"]) for r in records]
    if any(out is None for _, out in sizes):
        return None
    return sum(list(given) != list(out) for given, out in sizes) / len(sizes)
