"""What a run's result is made from, as named parts with a hash each, so that no old result stands for new inputs.

The parts: every file of this repository that the training process imports (views, rollout, trainer, scoring, the
method's module); every file of the user's own that the recipe's module imports or names, beside it or in packages of
theirs; the data, the base model, a recording that is replayed, the libraries, the kind of device. Names hold no path
of the machine, so a run of another checkout, folder or run_dir has the same parts.

What the recipe's and the profile's YAML say is told apart by the resolved settings (`settings`), key by key: a comment
is no difference, and a key that a word overrides is none either.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

import vopd.views
from vopd.common import caches, provenance
from vopd.common.caches import ROOT
from vopd.views import VIEWS

FILE = "started.json"
"""In a run folder: the parts that the run was started with."""
PLACES = (
    "run_dir", "recipe_folder", "model.path", "data.folder", "data.prepare", "rollout.replay", "rollout.record",
    "logging", "hardware.memory_gib", "hardware.disk_gib", "train.save_every", "train.save_minutes", "train.keep",
    "train.max_skipped_updates", "export",
)  # fmt: skip
"""Settings that do not decide a result: places (their content is a part of its own), needs, logging, saving."""
UNKNOWN = "with which code, data and base model it was made is not known"
ASKING = ("rollout", "evaluate", "hardware", "model", "verl")
NOT_ASKING = (
    "rollout.temperature", "rollout.top_p", "rollout.train_share", "rollout.record",
    "evaluate.every", "evaluate.validation_rows",
)  # fmt: skip
"""Settings that may change answers are in the sections ASKING, but for these: they are greedy, and asked at the end."""
CODE = ("vopd", "baselines", "data")
SCORING = ("vopd/evaluation/scoring",)
TRAINING = ("vopd/backbone/**/*.py", "vopd/backbone/*.yaml")
"""Where the training process starts; verl and Ray load these files by name, the others are imported from them."""

Parts = dict[str, str]


class Run(Protocol):
    """What is asked of a `vopd.runner.run.Run`."""

    config: Any

    def data_hash(self) -> str:
        """Hash of the splits."""

    def model_hash(self) -> str:
        """Hash of the base model."""


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


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the parts (or settings) that differ, are new or are gone; in the order of `now`."""
    names = dict.fromkeys([*now, *recorded])
    return [name for name in names if recorded.get(name) != now.get(name)]


def of_code(parts: Mapping[str, str]) -> Parts:
    """The parts that are code: the repository's, the recipe's, and the files that its settings name."""
    return {name: value for name, value in parts.items() if name.startswith(("code ", "recipe ", "file "))}


def why(recorded: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """What a sentence says of the differences, such as `another code vopd/views.py (and 2 more)`; empty for none."""
    if not recorded:
        return UNKNOWN
    names = differences(recorded, now)
    more = f" (and {len(names) - 1} more: {', '.join(names[1:4])}{', ...' if len(names) > 4 else ''})"
    return f"another {names[0]}{more if len(names) > 1 else ''}" if names else ""


# ---- in the run folder ----------------------------------------------------------------------------------------------


def write(folder: Path, parts: Parts) -> None:
    """Record in a run folder what the run is started with."""
    caches.write_whole(folder / FILE, (json.dumps(parts, indent=1) + "\n").encode())


def read(folder: Path) -> Parts | None:
    """What the run in a folder was started with; None where that is not known."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


# ---- the parts ------------------------------------------------------------------------------------------------------


def training() -> list[Path]:
    """The files that the training process starts from, whatever the method."""
    return [file for pattern in TRAINING for file in sorted(ROOT.glob(pattern))]


def method_files(module: str, recipe_folder: str | None) -> list[Path]:
    """The file of a method's module, given as in `vopd.method.load_module`."""
    if module.endswith(".py"):
        return [Path(recipe_folder or ".") / module]
    if (file := ROOT / f"{module.replace('.', '/')}.py").is_file():
        return [file]
    origin = getattr(sys.modules.get(module), "__file__", None) or _spec(module)
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
                if _short(value) and (file := folder / value).is_file():
                    found[f"file of {key}"] = provenance.hash_files([file])
                    break
    return found


def libraries() -> Parts:
    """Versions of what decides a result."""
    return {f"library {name}": version for name, version in provenance.library_versions().items()}


def device(kind: str) -> str:
    """`cpu`, or the kind of the cards."""
    if kind == "cpu":
        return kind
    import torch

    cards = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return " + ".join(sorted(cards)) or kind


def files(starts: Iterable[Path], recipe_folder: str | None = None, but: Sequence[str] = ()) -> Parts:
    """A part for each file and for each that it imports, directly or not: the repository's and the user's own.

    Args:
        starts: files to begin with.
        recipe_folder: where modules of the user's own are looked for first.
        but: files of the repository, or folders, that are left out with what they alone import.
    """
    beside = Path(recipe_folder).resolve() if recipe_folder else None
    left_out = [ROOT / name for name in but]
    found: set[Path] = set()
    waiting = [file.resolve() for file in starts if file.is_file()]
    while waiting:
        file = waiting.pop()
        if file not in found and not any(file.is_relative_to(place) for place in left_out):
            found.add(file)
            waiting += _imported(file, ROOT)
            if not _is_code(file):
                waiting += [*(_imported(file, beside) if beside else ()), *_installed(file), *_named(file)]
    parts = {_name(file, beside): provenance.hash_files([file])[:16] for file in found}
    return dict(sorted(parts.items(), key=lambda part: (part[0].startswith("code"), part[0])))


def _is_code(file: Path) -> bool:
    return file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] in CODE


def _name(file: Path, beside: Path | None) -> str:
    """Without the place: from the repository, from the recipe's folder, or from the folder of its package."""
    if _is_code(file):
        return f"code {file.relative_to(ROOT).as_posix()}"
    top = file.parent
    while (top / "__init__.py").is_file():
        top = top.parent
    top = beside if beside is not None and file.is_relative_to(beside) else top
    return f"recipe module {file.relative_to(top).as_posix()}"


def _imported(file: Path, folder: Path) -> set[Path]:
    """Files below `folder` that a file imports, and the packages around them; relative imports from anywhere."""
    found: set[Path] = set()
    for level, name in _imports(file):
        start = file.parents[level - 1] if level else folder
        found |= set(_module(start, name.split(".")))
    return found - {file}


def _module(place: Path, words: Sequence[str]) -> Iterator[Path]:
    """The files of a dotted name: the packages on the way, and the module where there is one."""
    for word in words:
        if (module := place / f"{word}.py").is_file():
            yield module.resolve()
            return
        place /= word
        if (package := place / "__init__.py").is_file():
            yield package.resolve()
        elif not place.is_dir():
            return


def _installed(file: Path) -> set[Path]:
    """Files that a file of the user's imports from packages of theirs, wherever these lie; libraries are left out."""
    found: set[Path] = set()
    for level, name in _imports(file):
        origin = _spec(name.split(".")[0]) if level == 0 and name else None
        if origin is not None and not _is_library(path := Path(origin).resolve()):
            folder = path.parents[1] if path.name == "__init__.py" else path.parent
            found |= set(_module(folder, name.split(".")))
    return found


def _spec(name: str) -> str | None:
    """The file of a module that can be imported; None if there is none."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None
    return spec.origin if spec is not None and spec.has_location else None


def _is_library(file: Path) -> bool:
    paths = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return any(file.is_relative_to(path.resolve()) for path in paths)


def _imports(file: Path) -> Sequence[tuple[int, str]]:
    return _parsed(file)[0]


def _named(file: Path) -> set[Path]:
    """Files beside a file that its text names, such as a table that it reads or a module that it loads by path."""
    return {path.resolve() for word in _parsed(file)[1] if (path := file.parent / word).is_file()}


def _parsed(file: Path) -> tuple[Sequence[tuple[int, str]], Sequence[str]]:
    return _parse(file.read_bytes()) if file.suffix == ".py" else ((), ())


@lru_cache(maxsize=1024)
def _parse(code: bytes) -> tuple[Sequence[tuple[int, str]], Sequence[str]]:
    """(level, dotted name) of every import, those in functions too, and the words that may name a file."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):  # said where it is imported
        return (), ()
    imports: dict[tuple[int, str], None] = {}
    words: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports |= dict.fromkeys((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [".".join(filter(None, (node.module, alias.name))) for alias in node.names]
            imports |= dict.fromkeys((node.level, name) for name in names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _may_name(node.value):
            words[node.value] = None
    return tuple(imports), tuple(words)


def _may_name(word: str) -> bool:
    return _short(word) and not word.startswith(("/", "~")) and ".." not in Path(word).parts


def _short(word: str) -> bool:
    return len(word) > 0 and word.isprintable() and len(word.encode()) <= 200


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
