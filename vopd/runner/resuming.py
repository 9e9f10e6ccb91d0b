"""Whose a run folder is, and what may differ between the command that began a run and the one that resumes it.

A folder belongs to runs if it is new, empty, or has the config.yaml of a run; nothing is written anywhere else. What
decides a result must be as it was; where a run logs, how often it saves and how much memory it may take is free.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vopd.backbone import checkpoints
from vopd.backbone.run_history import History
from vopd.common import fingerprint
from vopd.errors import UserError
from vopd.runner import run_fingerprint

CONFIG = "config.yaml"
EARLY = frozenset([fingerprint.FILE, "lock", "log.txt"])
"""What may be there before config.yaml is."""
MARKS = frozenset(["recipe", "profile", "method", "train", "rollout", "run_dir"])
FREE = (
    *run_fingerprint.PLACES,
    "train.steps",
    "evaluate.every",
    "evaluate.batch",
    "hardware.devices_per_node",
    "hardware.nodes",
)
"""Keys, or sections, that may differ in a resumed run. Model and data are identified by their hashes."""


def settings_of(folder: Path) -> dict[str, Any] | None:
    """The settings of the run that lives in a folder; None for a folder without one.

    Raises:
        UserError: the folder is not a run's: it holds files, and no config.yaml of a run.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise UserError(f"run_dir={folder}: this is a file; give a folder.")
    file = folder / CONFIG
    if not file.exists():
        others = sorted({path.name for path in folder.iterdir()} - EARLY)
        if others:
            raise UserError(
                f"run_dir={folder}: holds {others[0]} and no run; nothing is written there, give an empty folder."
            )
        return None
    try:
        found = OmegaConf.to_container(OmegaConf.load(file))
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: cannot be read ({str(error).splitlines()[0]}); give another run_dir."
        ) from error
    if not isinstance(found, dict) or not found.keys() >= MARKS:
        raise UserError(f"{file}: not the settings of a run; nothing is written there, give another run_dir.")
    return {str(key): value for key, value in found.items()}


def write_settings(settings: Any, folder: Path) -> None:
    """Put the settings into the folder, whole or not at all."""
    part = folder / f"{CONFIG}.part"
    OmegaConf.save(settings, part)
    os.replace(part, folder / CONFIG)


def differences(first: Any, second: Any, prefix: str = "") -> set[str]:
    """Dotted keys whose values differ between two trees of settings."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = set(first) | set(second)
        return set().union(
            *(differences(first.get(k), second.get(k), f"{prefix}.{k}".lstrip(".")) for k in keys)
        )
    return set() if first == second else {prefix}


def that_matter(keys: Iterable[str]) -> list[str]:
    """Those of some dotted keys that decide a result."""
    return sorted(key for key in keys if not any(key == free or key.startswith(f"{free}.") for free in FREE))


def has_results(folder: Path) -> bool:
    """Whether a run has left anything that another one must not take for its own, or lose."""
    names = ("metrics.jsonl", "rollouts", "summary.json")
    return any((folder / name).exists() for name in names) or bool(checkpoints.found(folder / "checkpoints"))


def check_steps(folder: Path, steps: int, ahead: bool) -> None:
    """Refuse a number of updates that the run in `folder` has passed, or for which its rollouts are too few.

    ahead: whether all rollouts are generated before the first update.

    Raises:
        UserError: as said.
    """
    made = max((checkpoint.step for checkpoint in checkpoints.found(folder / "checkpoints")), default=0)
    if steps < made:
        raise UserError(
            f"train.steps={steps}: the run in {folder} has made {made} updates; give at least as many, or another "
            "run_dir."
        )
    recorded = len(list((folder / "rollouts").glob("step*.parquet"))) if made and ahead else steps
    if recorded < steps:
        raise UserError(
            f"train.steps={steps}: the run in {folder} generated the rollouts of {recorded} updates with its initial "
            "weights before it began to train, and cannot have more; give another run_dir."
        )


def reopen(folder: Path, steps: int) -> None:
    """Let a finished run be trained further: its results stay, under names that tell after how many updates.

    Raises:
        UserError: its last checkpoint is gone.
    """
    if not any(checkpoint.step == steps for checkpoint in checkpoints.found(folder / "checkpoints")):
        raise UserError(
            f"{folder}: holds a finished run of {steps} updates without its last checkpoint, so it cannot be trained "
            "further; give another run_dir."
        )
    for name in ("summary.json", "summary.txt", "records/after.jsonl", "model"):
        path = folder / name
        if path.exists():
            path.rename(path.with_name(f"{path.stem}_step{steps}{path.suffix}"))
    History(folder).rename_evaluation("after", f"after_step{steps}")
