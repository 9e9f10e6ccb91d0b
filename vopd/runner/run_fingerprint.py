"""What a run's result is made from, as named parts with a hash each, so that no old result is shown for new inputs.

The parts: every file of this repository that the training process imports (views, rollout, trainer, scoring, the
method's module); every file of the user's own that the recipe's module imports or names, beside it or in packages of
theirs; the data, the base model, a recording that is replayed, the libraries, the kind of device. Names hold no path
of the machine, so a run of another checkout, folder or run_dir has the same parts.

What the recipe's and the profile's YAML say is compared by the resolved settings (`settings`), key by key: a comment
is not a difference, and a key that an override replaces is none either.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

import vopd.views
from vopd.common import provenance
from vopd.common.fingerprint import Parts, device, files, is_path, libraries, module_file
from vopd.common.paths import ROOT
from vopd.views import VIEWS

PLACES = (
    "run_dir", "recipe_folder", "model.path", "data.folder", "data.prepare", "rollout.replay", "rollout.record",
    "logging", "hardware.memory_gib", "hardware.disk_gib", "train.save_every", "train.save_minutes", "train.keep",
    "train.max_skipped_updates", "export",
)  # fmt: skip
"""Settings that do not decide a result: places (their content is a part of its own), needs, logging, saving."""
ASKING = ("rollout", "evaluate", "hardware", "model", "verl")
NOT_ASKING = (
    "rollout.temperature", "rollout.top_p", "rollout.train_share", "rollout.record",
    "evaluate.every", "evaluate.validation_rows",
)  # fmt: skip
"""Settings that may change answers are in the sections ASKING, but for these: they are greedy, and asked at the end."""
TRAINING = ("vopd/backbone/**/*.py", "vopd/backbone/*.yaml")
"""Where the training process starts; verl and Ray load these files by name, the others are imported from them."""


class Run(Protocol):
    """What is asked of a `vopd.runner.run.Run`."""

    config: Any

    def data_hash(self) -> str:
        """Hash over the splits in the data folder."""

    def model_hash(self) -> str:
        """Hash over the base model's files."""


def of(run: Run) -> Parts:
    """The parts of a run as its inputs are now.

    Raises:
        UserError: the data is not there, or not as it was validated.
    """
    config = run.config
    return {
        **files(
            [*training(), *method_files(config.method.module, config.recipe_folder)], config.recipe_folder
        ),
        "data": run.data_hash(),
        "base model": run.model_hash(),
        **recording(config.rollout.replay),
        **settings_files(config),
        **libraries(),
        "device": device(config.hardware.device),
    }


def answers(run: Run, views: Sequence[str]) -> dict[str, Any]:
    """All that decides how the base model answers before training, by name: the key of its kept answers.

    It is the same for every seed and method, as long as these views are asked. The method's own module counts only
    where one of them comes from there.
    """
    config = run.config
    asked = {
        key: value
        for key, value in settings(config).items()
        if key.split(".")[0] in ASKING and key not in NOT_ASKING
    }
    return {
        **files([*training(), *view_files(views, config)], config.recipe_folder),
        "data": run.data_hash(),
        "base model": run.model_hash(),
        **libraries(),
        "device": device(config.hardware.device),
        "views": list(views),
        **asked,
    }


def view_files(views: Sequence[str], config: Any) -> list[Path]:
    """The method's file if one of the views is not of `vopd.views` itself; its imports follow from there."""
    strangers = [view for view in views if VIEWS[view].__module__ != vopd.views.__name__]
    return method_files(config.method.module, config.recipe_folder) if strangers else []


def settings(config: Any) -> dict[str, Any]:
    """Settings that decide a result, under dotted names; a module that is named by file counts by its name alone."""
    plain: Any = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    found = {
        key: value
        for key, value in _flat(plain, "")
        if not any(key == place or key.startswith(f"{place}.") for place in PLACES)
    }
    module = str(found.get("method.module"))
    return found | {"method.module": Path(module).name if module.endswith(".py") else module}


def training() -> list[Path]:
    """The files that the training process starts from, whatever the method."""
    return [file for pattern in TRAINING for file in sorted(ROOT.glob(pattern))]


def method_files(module: str, recipe_folder: str | None) -> list[Path]:
    """The file of a method's module, given as in `vopd.method.load_module`."""
    if module.endswith(".py"):
        return [Path(recipe_folder or ".") / module]
    if (file := ROOT / f"{module.replace('.', '/')}.py").is_file():
        return [file]
    origin = getattr(sys.modules.get(module), "__file__", None) or module_file(module)
    return [Path(origin)] if origin else []


def recording(folder: str | None) -> Parts:
    """Rollouts that are trained on instead of being generated."""
    return {"recording": provenance.hash_files(Path(folder).glob("*.parquet"))} if folder else {}


def settings_files(config: Any) -> Parts:
    """Files that the method's own settings name, from the recipe's folder or the repository: their content counts."""
    found: Parts = {}
    for key, value in settings(config).items():
        if key.startswith("method.") and key != "method.module" and isinstance(value, str) and value:
            for folder in (Path(config.recipe_folder or "."), ROOT):
                if is_path(value) and (file := folder / value).is_file():
                    found[f"file of {key}"] = provenance.hash_files([file])
                    break
    return found


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
