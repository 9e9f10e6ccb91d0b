"""Small triplet files for runs through `vopd run`, and the overrides that make such a run short."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data import schema, validate
from data.miniature import prepare

ROWS = {"train": 48, "validation": 8, "test": 24, "holdout": 12}


@pytest.fixture(scope="session")
def triplets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four files, a few rows each, validated."""
    folder = tmp_path_factory.mktemp("triplets")
    for split, count in ROWS.items():
        schema.write(prepare.rows(split, count, 0), folder / f"{split}.parquet")
    assert not validate.stamped(folder).blocking
    return folder


@pytest.fixture(scope="session")
def overrides_for(triplets: Path) -> Callable[..., list[str]]:
    """Overrides for a run of four updates in a given folder; further overrides replace those of the same key."""

    def overrides(run_dir: Path, *more: str) -> list[str]:
        given = [*more]
        keys = {override.partition("=")[0] for override in more}
        given += [override for override in [
            f"run_dir={run_dir}",
            f"data.folder={triplets}",
            "data.prepare=null",
            "train.steps=4",
            "train.prompts=8",
            "train.rollouts=2",
            "train.save_every=2",
            "train.warmup_steps=1",
            "evaluate.validation_rows=8",
            "evaluate.every=100",
            "export=float32",
            "hardware.memory_gib=0.01",
            "hardware.disk_gib=0.01",
        ] if override.partition("=")[0] not in keys]  # fmt: skip
        return given

    return overrides
