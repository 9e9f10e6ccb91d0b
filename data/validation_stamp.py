"""The stamp that a validated data folder carries: `validated.json`, with the hash of every split that was checked.

`data.validate` writes it, training refuses a folder without it or with data that has changed since. It is in the
folder and holds no path, so it moves with the data.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data import schema
from vopd.common import ownership
from vopd.errors import UserError

NAME = "validated.json"
CHECKS = 2
"""Version of the checks: raised when data that passed must be looked at again."""


def write(folder: Path, rows: dict[str, int], hashes: dict[str, str], warnings: dict[str, int]) -> None:
    """rows, hashes: by split; warnings: findings by kind that do not keep anyone from training."""
    _check_ours(folder)
    splits = {name: {"rows": rows[name], "hash": hashes[name]} for name in sorted(rows)}
    content = {"checks": CHECKS, "splits": splits, "warnings": warnings}
    with ownership.atomic(folder / NAME) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def remove(folder: Path) -> None:
    """Takes the stamp away, if there is one."""
    _check_ours(folder)
    try:
        (folder / NAME).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder / NAME}: cannot be removed ({error.strerror}).") from error


def current(folder: Path) -> bool:
    """Whether there is a stamp of today's checks. `check` tells whether the data is still the same."""
    return bool((_read(folder) or {}).get("checks") == CHECKS)


def _check_ours(folder: Path) -> None:
    """`UserError` if something with the stamp's name is not a stamp: it is the user's, and stays."""
    if os.path.lexists(folder / NAME) and _read(folder) is None:
        raise UserError(f"{folder / NAME}: not a stamp of data.validate; move it away, its name is needed.")


def _read(folder: Path) -> dict[str, Any] | None:
    """The content of what is a stamp, if only by its keys."""
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and {"checks", "splits"} <= content.keys() else None


def check(folder: Path, splits: Iterable[str]) -> dict[str, str]:
    """Hash by split if all of `splits` and everything else in the folder was validated as it is now.

    Raises:
        UserError: the folder has no stamp, an older one, or a split was changed, added or removed since.
    """
    again = f"run `vopd data validate {folder}`"
    try:
        content: dict[str, Any] = json.loads((folder / NAME).read_text(encoding="utf-8"))
        stamped = {name: str(split["hash"]) for name, split in content["splits"].items()}
    except FileNotFoundError as error:
        raise UserError(f"{folder}: this data was never validated; {again} first.") from error
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{folder / NAME}: not a stamp of data.validate; move it away and {again}."
        ) from error
    if content.get("checks") != CHECKS:
        raise UserError(f"{folder}: validated with another version of the checks; {again} again.")
    hashes = {}
    for name in sorted({*splits, *stamped, *(path.stem for path in schema.splits(folder))}):
        hashes[name] = schema.split_hash(folder / f"{name}.parquet")
        if hashes[name] != stamped.get(name):
            raise UserError(f"{folder}: the split {name!r} is not the one that was validated; {again} again.")
    return hashes
