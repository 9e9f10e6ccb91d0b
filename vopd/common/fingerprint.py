"""Named parts with a hash each that a result was made from: files of code with all that they import, and libraries.

`files` follows imports: the repository's own modules, and the user's beside a recipe or in packages of theirs. Names
hold no path of the machine. What a run is made from is put together in `vopd/runner/run_fingerprint.py`.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from vopd.common import provenance
from vopd.common.files import write_text
from vopd.common.paths import ROOT

FILE = "started.json"
"""In a run folder: the parts that the run was started with."""
UNKNOWN = "with which code, data and base model it was made is not known"
CODE = ("vopd", "baselines", "data")
SCORING = ("vopd/evaluation/scoring",)

Parts = dict[str, str]


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
    write_text(folder / FILE, json.dumps(parts, indent=1) + "\n", sync=True)


def read(folder: Path) -> Parts | None:
    """What the run in a folder was started with; None where that is not known."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


# ---- the parts ------------------------------------------------------------------------------------------------------


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
    """Files that a file of the user's imports from packages of theirs, wherever these are; libraries are left out."""
    found: set[Path] = set()
    for level, name in _imports(file):
        origin = module_file(name.split(".")[0]) if level == 0 and name else None
        if origin is not None and not _is_library(path := Path(origin).resolve()):
            folder = path.parents[1] if path.name == "__init__.py" else path.parent
            found |= set(_module(folder, name.split(".")))
    return found


def module_file(name: str) -> str | None:
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
    return is_path(word) and not word.startswith(("/", "~")) and ".." not in Path(word).parts


def is_path(word: str) -> bool:
    return len(word) > 0 and word.isprintable() and len(word.encode()) <= 200
