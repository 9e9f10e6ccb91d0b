"""A run's folder: its files, whose it is, and what may differ between the command that began it and one that resumes.

A folder belongs to runs if it is new, empty, or has the config.yaml of a run; nothing is written anywhere else. What
decides a result must be as it was; where a run logs, how often it saves and how much memory it may take is free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vopd.backbone import checkpoints
from vopd.backbone.run_history import History
from vopd.common import caches, files, fingerprint
from vopd.common.failures import FAILURE
from vopd.errors import UserError
from vopd.evaluation.records import read_records
from vopd.runner import run_fingerprint

CONFIG = "config.yaml"
ANSWERS = "evaluations"  # the cache of base models' answers
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


@dataclass(frozen=True)
class RunFolder:
    """A folder of a run: its files by name, whose it is, and what may be done with it."""

    path: Path

    @property
    def summary(self) -> Path:
        """The finished run's figures."""
        return self.path / "summary.json"

    @property
    def summary_text(self) -> Path:
        """The same for a terminal."""
        return self.path / "summary.txt"

    @property
    def log(self) -> Path:
        """What all processes printed."""
        return self.path / "log.txt"

    @property
    def failure(self) -> Path:
        """Why the last start ended early."""
        return self.path / FAILURE

    @property
    def base_answers(self) -> Path:
        """The base model's answers."""
        return self.path / "records" / "before.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of all checkpoints."""
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether a run came to its end here."""
        return self.summary.exists()

    def inputs(self) -> fingerprint.Parts | None:
        """What the run here was started with; None where that is not known."""
        return fingerprint.read(self.path)

    def take_base_answers(self, key: str) -> bool:
        """Put kept answers of the base model into the folder; False if none are kept under this key."""
        kept = caches.read(ANSWERS, key)
        if kept is not None and not self.base_answers.exists():
            self.base_answers.parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(self.base_answers, kept, sync=True)
        return kept is not None

    def keep_base_answers(self, key: str) -> None:
        """Keep the answers that were made here, if they are whole, for runs with the same key."""
        if self.base_answers.exists() and not read_records(self.base_answers).torn:
            caches.store(ANSWERS, key, self.base_answers.read_bytes())

    def forget_evaluations(self) -> None:
        """Remove what was answered before the first update: it belongs to other inputs."""
        for file in (self.base_answers, self.path / "evaluations.jsonl"):
            file.unlink(missing_ok=True)

    def settings(self) -> dict[str, Any] | None:
        """The settings of the run that lives here; None for a folder without one.

        Raises:
            UserError: the folder is not a run's: it holds files, and no config.yaml of a run.
        """
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise UserError(f"run_dir={self.path}: this is a file; give a folder.")
        file = self.path / CONFIG
        if not file.exists():
            names = {path.name for path in self.path.iterdir()} - EARLY
            others = sorted(name for name in names if not files.is_temporary(name))
            if others:
                raise UserError(
                    f"run_dir={self.path}: holds {others[0]} and no run; nothing is written there, give an "
                    "empty folder."
                )
            return None
        try:
            found = OmegaConf.to_container(OmegaConf.load(file))
        except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{file}: cannot be read ({str(error).splitlines()[0]}); give another run_dir."
            ) from error
        if not isinstance(found, dict) or not found.keys() >= MARKS:
            raise UserError(
                f"{file}: not the settings of a run; nothing is written there, give another run_dir."
            )
        return {str(key): value for key, value in found.items()}

    def write_settings(self, settings: Any) -> None:
        """Put the settings into the folder, whole or not at all."""
        with files.replacing(self.path / CONFIG) as partial:
            OmegaConf.save(settings, partial)

    def has_results(self) -> bool:
        """Whether a run has left anything that another one must not take for its own, or lose."""
        names = ("metrics.jsonl", "rollouts", "summary.json")
        return any((self.path / name).exists() for name in names) or bool(
            checkpoints.found(self.path / "checkpoints")
        )

    def check_steps(self, steps: int, ahead: bool) -> None:
        """Refuse a number of updates that the run in the folder has passed, or for which its rollouts are too few.

        ahead: whether all rollouts are generated before the first update.

        Raises:
            UserError: the run has made more updates, or recorded fewer rollouts.
        """
        made = max(
            (checkpoint.step for checkpoint in checkpoints.found(self.path / "checkpoints")), default=0
        )
        if steps < made:
            raise UserError(
                f"train.steps={steps}: the run in {self.path} has made {made} updates; give at least as many, or "
                "another "
                "run_dir."
            )
        recorded = len(list((self.path / "rollouts").glob("step*.parquet"))) if made and ahead else steps
        if recorded < steps:
            raise UserError(
                f"train.steps={steps}: the run in {self.path} generated the rollouts of {recorded} updates with its "
                "initial "
                "weights before it began to train, and cannot have more; give another run_dir."
            )

    def reopen(self, steps: int) -> None:
        """Let a finished run be trained further: its results stay, under names with the number of updates.

        Raises:
            UserError: its last checkpoint is gone.
        """
        if not any(checkpoint.step == steps for checkpoint in checkpoints.found(self.path / "checkpoints")):
            raise UserError(
                f"{self.path}: holds a finished run of {steps} updates without its last checkpoint, so it cannot be "
                "trained "
                "further; give another run_dir."
            )
        for name in ("summary.json", "summary.txt", "records/after.jsonl", "model"):
            path = self.path / name
            if path.exists():
                path.rename(path.with_name(f"{path.stem}_step{steps}{path.suffix}"))
        History(self.path).rename_evaluation("after", f"after_step{steps}")
