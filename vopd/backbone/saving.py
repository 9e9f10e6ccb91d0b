"""When a run's checkpoints are written, what is in them beside the workers' part, and how a run resumes from one."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vopd.backbone import checkpoints
from vopd.common.failures import explain
from vopd.errors import TrainingError

STATE, DATA, ACTOR = "trainer.json", "data.pt", "actor"  # in a checkpoint, beside the run's config.yaml
SAVING_SHARE = 0.1  # of the time at most goes to checkpoints that are made because of the time


@dataclass(frozen=True)
class Finished:
    """An update that was made: its number, the place in the prompt stream behind it, counters and its line."""

    step: int
    data_state: Any
    state: dict[str, Any]


class Saving:
    """See the module's docstring.

    Args:
        run_dir: of the run.
        train: its settings `train`: save_every (updates), save_minutes, keep.
    """

    def __init__(self, run_dir: Path, train: Any) -> None:
        self.run_dir, self.train = run_dir, train
        self.folder = run_dir / "checkpoints"
        self.saved_at, self.save_seconds = time.monotonic(), 0.0

    def due(self, step: int, last: int) -> bool:
        """By count, by time, and after the last update; not twice for one update."""
        if self.newest() == step:
            return False
        passed = time.monotonic() - self.saved_at
        by_time = passed > max(60 * self.train.save_minutes, self.save_seconds / SAVING_SHARE)
        by_count = self.train.save_every > 0 and step % self.train.save_every == 0
        return by_time or by_count or step >= last

    def newest(self) -> int:
        """The update of the newest checkpoint, 0 without one."""
        return max((checkpoint.step for checkpoint in checkpoints.found(self.folder)), default=0)

    def save(self, finished: Finished, workers: Any) -> None:
        """Write everything that the run resumes from, as it was after this update.

        Raises:
            TrainingError: it could not be written; the checkpoints that were there are as before.
        """
        start = time.monotonic()
        try:
            with checkpoints.writing(self.folder, finished.step) as folder:
                workers.save_checkpoint(str(folder / ACTOR), None, finished.step)
                torch.save(finished.data_state, folder / DATA)
                (folder / STATE).write_text(json.dumps(finished.state), encoding="utf-8")
                shutil.copyfile(self.run_dir / "config.yaml", folder / "config.yaml")
        except (OSError, SafetensorError) as error:
            newest = self.newest()
            kept = f"the last one is of update {newest}" if newest else "there is none yet"
            raise TrainingError(
                f"The checkpoint of update {finished.step} could not be written to {self.folder} "
                f"({explain(error).sentence}); {kept}. Make room there and run the same command again."
            ) from error
        checkpoints.prune(self.folder, self.train.keep)
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - start

    def load(self, workers: Any) -> Finished | None:
        """Have the workers load the newest checkpoint, which was checked before the start; None without one."""
        found = checkpoints.found(self.folder)
        if not found:
            return None
        folder = found[0].folder
        workers.load_checkpoint(str(folder / ACTOR))
        place = torch.load(folder / DATA, weights_only=True)
        return Finished(found[0].step, place, json.loads((folder / STATE).read_text(encoding="utf-8")))
