"""Whether runs may share a table: the same data, base model, budget, judge, parser and questions.

A method may differ in its own settings and, as an ablation, in whatever its recipe says; what is listed here may not
differ between any two rows. Runs of one recipe must also agree in every setting but the seed and in the code that made
them (the repository's, the recipe's module and what it imports), or they are not seeds of one another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vopd.common import fingerprint
from vopd.common.provenance import hash_json
from vopd.errors import UserError
from vopd.evaluation.records import Record
from vopd.report.run_folders import Run

BUDGET = (
    "train.steps", "train.prompts", "train.rollouts", "train.updates_per_batch",
    "rollout.temperature", "rollout.top_p", "rollout.max_prompt_tokens", "rollout.max_response_tokens",
    "rollout.chat_template", "export",
)  # fmt: skip
"""Settings that make a budget or decide how models are asked: equal updates x kept groups."""
PLACES = (
    "seed",
    "run_dir",
    "recipe_folder",
    "model.path",
    "data.folder",
    "data.prepare",
    "hardware",
    "logging",
)
"""Settings that may differ between seeds of one recipe: the seed, places (their contents are hashed), the machine."""
VIEWS = ("full", "crop")


def scorer(run: Run) -> Mapping[str, Any]:
    """Rule, judge and hash of the parser's code of a run; older runs did not record it."""
    recorded = run.facts.get("scorer")
    return (
        recorded if isinstance(recorded, dict) else dict.fromkeys(("rule", "judge", "code"), "not recorded")
    )


def check(runs: Sequence[Run], mixed: bool = False) -> list[str]:
    """Sentences that name what differs; an empty list where all runs are comparable.

    Args:
        runs: at least one.
        mixed: whether runs that differ are wanted in one table nevertheless.

    Raises:
        UserError: the first difference, unless `mixed`. In any case when one run was given twice.
    """
    _once_each(runs)
    found: dict[str, str] = {}
    for what, first, second, values in _differences(runs):
        if what not in found:
            found[what] = (
                f"{first.folder} and {second.folder} differ in {what} ({_short(values[0])} and "
                f"{_short(values[1])})"
            )
            if not mixed:
                raise UserError(
                    f"{found[what]}, so their results are not comparable; leave one out, or give mixed=true."
                )
    return [f"{sentence}." for sentence in found.values()]


def label(run: Run, runs: Sequence[Run]) -> str:
    """The recipe's name; with the settings that differ where runs of the recipe are not seeds of one another."""
    same = [other for other in runs if other.recipe == run.recipe and other.kind == run.kind]
    coded = len({_code_hash(other) for other in same}) > 1
    own, *others = (
        settings_of(other) | ({"code": _code_hash(other)[:8]} if coded else {}) for other in (run, *same)
    )
    keys = sorted({key for other in others for key in own | other if own.get(key) != other.get(key)})
    chosen = ", ".join(f"{key}={own.get(key)}" for key in keys)
    return f"{run.recipe} ({chosen})" if chosen else run.recipe


def settings_of(run: Run) -> dict[str, Any]:
    """Every setting but those in PLACES, under dotted names."""
    flat = dict(_flat(run.facts["settings"]))
    return {
        key: value for key, value in flat.items() if key not in PLACES and key.split(".", 1)[0] not in PLACES
    }


def code_of(run: Run) -> Mapping[str, str]:
    """The code of a run, file by file; of older runs one hash over that of the repository."""
    parts = run.facts.get("fingerprint")
    return fingerprint.of_code(parts) if parts else {"code": str(run.facts.get("code_hash"))}


def _code_hash(run: Run) -> str:
    parts = code_of(run)
    return parts.get("code") or hash_json(parts)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _at(settings: Mapping[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _once_each(runs: Sequence[Run]) -> None:
    seen: list[Run] = []
    for run in runs:
        for other in seen:
            if (run.recipe, run.kind, run.seed) == (other.recipe, other.kind, other.seed) and settings_of(
                run
            ) == settings_of(other):
                raise UserError(
                    f"{other.folder} and {run.folder} are both {run.recipe}, seed {run.seed}; give one of them."
                )
        seen.append(run)


def _differences(runs: Sequence[Run]) -> Iterator[tuple[str, Run, Run, tuple[Any, Any]]]:
    """(what, a run, another run, their values), shared things first."""
    reference = runs[0]
    sides = [_shared(run) for run in runs]
    for what, value in sides[0].items():
        for run, side in zip(runs[1:], sides[1:], strict=True):
            if side[what] != value:
                yield what, reference, run, (value, side[what])
    first: dict[tuple[str, str], Run] = {}
    for run in runs:
        other = first.setdefault((run.kind, run.recipe), run)
        one, two = settings_of(other), settings_of(run)
        for key in sorted(one | two):
            if one.get(key) != two.get(key):
                yield f"the setting {key} of {run.recipe}", other, run, (one.get(key), two.get(key))
        codes = code_of(other), code_of(run)
        for name in fingerprint.differences(*codes):
            yield f"the {name} of {run.recipe}", other, run, (codes[0].get(name), codes[1].get(name))


def _shared(run: Run) -> dict[str, Any]:
    settings = run.facts["settings"]
    judged = scorer(run)
    return {
        "the data": run.facts["data_hash"],
        "the base model": run.facts["model_hash"],
        **{f"the budget ({key})": _at(settings, key) for key in BUDGET},
        "the judge": judged["judge"],
        "the scorer": judged["rule"],
        "the parser's code": judged["code"],
        "the questions answered before training": _questions(run.before),
        "the questions answered after training": _questions(run.after),
    }


class _Questions(frozenset[tuple[str, str, str]]):
    """(split, view, id) of the answers; shown in messages as their number."""

    def __str__(self) -> str:
        return f"{len(self)} answers"


def _questions(records: Sequence[Record]) -> _Questions:
    return _Questions((r.split, r.view, r.id) for r in records if r.view in VIEWS)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
