"""The small form of a run folder, for the repository: `vopd report RUNS... keep=FOLDER`.

summary.json, evaluations.jsonl, and the metrics and records packed with gzip; no weights, checkpoints or logs. The
report reads it like the run folder itself. Packing is deterministic, so keeping a run again changes nothing; paths of
the machine are cut to the part inside the repository.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vopd.common import ownership
from vopd.errors import UserError
from vopd.evaluation.records import read_packed
from vopd.report.run_folders import METHODS, Run


def keep(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write each run to <folder>/<profile>/[ablations|controls/]<recipe>/seed<k>; returns those folders.

    Raises:
        UserError: a run's recipe or profile is not a name of a folder; two runs would land in one place (one recipe and
            seed with different settings), or a run is there itself, or something other than this run's record, which
            is not written over.
    """
    targets: dict[Path, Run] = {}
    for run in runs:
        for name in (str(run.facts["profile"]), run.recipe):
            if Path(name).name != name or name in ("", "..") or not name.isprintable():
                raise UserError(
                    f"{run.folder}: its summary names a recipe or profile {name!r}; that is not a valid name."
                )
        kind = "" if run.kind == METHODS else run.kind
        target = folder / str(run.facts["profile"]) / kind / run.recipe / f"seed{run.seed}"
        if target in targets:
            raise UserError(
                f"{targets[target].folder} and {run.folder} would both be kept in {target}; give one."
            )
        if target.resolve() == run.folder.resolve():
            raise UserError(
                f"{run.folder} is kept already; give another keep=FOLDER or the run folder itself."
            )
        targets[target] = run
    for target, run in targets.items():
        _keep(run, target)
    return list(targets)


def _keep(run: Run, target: Path) -> None:
    with ownership.scratch(target.parent) as place:
        packed = place / target.name
        _pack(run, packed)
        if not os.path.lexists(target):
            packed.rename(target)
        elif _contents(target) != _contents(packed):
            raise UserError(
                f"{target}: holds something other than the record of {run.folder}; remove it or give another "
                "keep=FOLDER."
            )


def _contents(folder: Path) -> dict[str, bytes] | None:
    """What the files below hold, unpacked; None if it is not a folder or cannot be read."""
    try:
        return {
            file.relative_to(folder).as_posix(): gzip.decompress(content) if file.suffix == ".gz" else content
            for file in folder.rglob("*")
            if not file.is_dir()
            for content in [file.read_bytes()]
        }
    except (OSError, EOFError, zlib.error):
        return None


def _pack(run: Run, partial: Path) -> None:
    (partial / "records").mkdir(parents=True)
    summary = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
    settings = summary["run"]["settings"]
    summary["run"]["settings"] = without_places(settings, repository(settings) or Path("/nowhere"))
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    (partial / "summary.json").write_text(text + "\n", encoding="utf-8")
    if (run.folder / "evaluations.jsonl").is_file():
        shutil.copyfile(run.folder / "evaluations.jsonl", partial / "evaluations.jsonl")
    names = ["before", "after", *(f"step{step}" for step in run.validation)]
    for name in ("metrics.jsonl", *(f"records/{name}.jsonl" for name in names)):
        packed = gzip.compress(read_packed(run.folder / name), compresslevel=9, mtime=0)
        (partial / f"{name}.gz").write_bytes(packed)


def repository(settings: dict[str, Any]) -> Path | None:
    """The folder of the repository that a run was started from, read off its recipe's place; None: not from one."""
    recipes = Path(str(settings.get("recipe_folder") or "/"))
    return next((p.parent for p in (recipes, *recipes.parents) if p.name == "recipes"), None)


def without_places(value: Any, root: Path) -> Any:
    """Settings whose paths do not tell the machine: relative to `root`, those outside it by their name alone."""
    if isinstance(value, dict):
        return {key: without_places(item, root) for key, item in value.items()}
    if isinstance(value, list):
        return [without_places(item, root) for item in value]
    if isinstance(value, str) and value.startswith("/"):
        path = Path(value)
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
    return value
