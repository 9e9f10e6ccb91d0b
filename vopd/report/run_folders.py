"""Run folders as a comparison reads them: found, checked, loaded; what is broken is named and left out.

A run folder is one that `vopd run` left, or the small form of it that `vopd.report.archive` writes (record
files and metrics packed with gzip). Both are read the same way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vopd.errors import UserError
from vopd.evaluation.records import Record, read_records
from vopd.report.run_summary import read_metrics

METHODS, KINDS = "methods", ("ablations", "controls")
REPLACED = "replaced"
"""Folder into which `vopd compare` moves runs that it had to repeat; skipped unless it is named itself."""


@dataclass(frozen=True)
class Run:
    """One finished run.

    kind: METHODS, or the folder below recipes/ that holds its recipe, a name in KINDS. facts: "run" of its
    summary.json (code, hashes, method, settings, times); cost: "cost" of it; collapse: flag -> steps.
    validation: step -> answers to the validation questions. metrics: lines of metrics.jsonl by step.
    """

    folder: Path
    recipe: str
    kind: str
    seed: int
    facts: dict[str, Any]
    cost: dict[str, Any]
    collapse: dict[str, list[int]]
    before: list[Record]
    after: list[Record]
    validation: dict[int, list[Record]]
    metrics: list[dict[str, Any]]


@dataclass(frozen=True)
class Broken:
    """A folder that could not be used, and the sentence that says why."""

    folder: Path
    why: str


def find(paths: Sequence[Path]) -> list[Path]:
    """The run folders among and below the given ones, each once, in order.

    Raises:
        UserError: a path that is not a folder, or a folder without any run.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"There is no folder {path}; give run folders, or a folder that contains them.")
        below = [path] if _is_run(path) else _below(path)
        if not below:
            raise UserError(f"{path} holds no run; give run folders, or a folder that contains them.")
        found |= dict.fromkeys(below)
    return list(found)


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.yaml", "summary.json", "records"))


def _below(path: Path) -> list[Path]:
    found = []
    for folder in sorted(p for p in path.iterdir() if p.is_dir() and p.name != REPLACED):
        found += [folder] if _is_run(folder) else _below(folder)
    return found


def read_all(
    folders: Sequence[Path], seen: Callable[[], Any] = lambda: None
) -> tuple[list[Run], list[Broken]]:
    """Every folder that holds a whole run, and the others with what is wrong. `seen` is called after each."""
    runs, broken = [], []
    for folder in folders:
        try:
            runs.append(read(folder))
        except UserError as error:
            broken.append(Broken(folder, str(error)))
        seen()
    return runs, broken


def read(folder: Path) -> Run:
    """Load one run folder.

    Raises:
        UserError: no summary (interrupted, or still running), one without what a comparison needs, missing or
            broken record files, or one that is cut short.
    """
    summary = _summary(folder)
    facts = summary["run"]
    kind = Path(str(facts["settings"].get("recipe_folder") or "")).name
    before, after = (_records(folder / "records" / f"{when}.jsonl") for when in ("before", "after"))
    return Run(
        folder=folder,
        recipe=str(facts["recipe"]),
        kind=kind if kind in KINDS else METHODS,
        seed=int(facts["seed"]),
        facts=facts,
        cost=summary["cost"],
        collapse=summary.get("collapse", {}),
        before=before,
        after=after,
        validation=_validation(folder / "records"),
        metrics=read_metrics(folder),
    )


def _summary(folder: Path) -> dict[str, Any]:
    file = folder / "summary.json"
    if not file.is_file():
        raise UserError(f"{folder} has no summary.json: it was interrupted, failed, or is still running.")
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON; remove the folder and run it again.") from error
    parts: dict[str, tuple[str, ...]] = {
        "run": ("recipe", "seed", "code", "data_hash", "model_hash", "settings", "method"),
        "cost": ("prompts", "rollouts", "tokens_generated", "updates", "seconds", "seconds_by_phase"),
    }
    for part, keys in parts.items():
        content = summary.get(part) if isinstance(summary, dict) else None
        missing = [key for key in keys if not isinstance(content, dict) or key not in content]
        if missing:
            raise UserError(
                f"{file} has no '{part}.{missing[0]}'; it is not the summary of a run of this code."
            )
    return dict(summary)


def _records(file: Path) -> list[Record]:
    content = read_records(file)
    if content.torn:
        raise UserError(f"{file} is cut short in its last line; remove the folder and run it again.")
    if not content.records:
        raise UserError(f"{file} holds no answers; remove the folder and run it again.")
    return content.records


def _validation(folder: Path) -> dict[int, list[Record]]:
    names = {re.sub(r"\.gz$", "", file.name) for file in folder.glob("step*.jsonl*")}
    steps = {int(match[1]): name for name in names if (match := re.fullmatch(r"step(\d+)\.jsonl", name))}
    return {step: _records(folder / steps[step]) for step in sorted(steps)}
