"""The stamp that a validated data folder carries: `validated.json`, with the hash of every split that was checked.

`data.validate` writes it, training refuses a folder without it or with data that has changed since. It lies in the
folder and holds no path, so it moves with the data.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data import schema
from vopd.errors import UserError

NAME = "validated.json"
CHECKS = 2
"""Version of the checks: raised when data that passed must be looked at again."""


def write(folder: Path, rows: dict[str, int], hashes: dict[str, str], warnings: dict[str, int]) -> None:
    """rows, hashes: by split; warnings: findings by kind that do not keep anyone from training."""
    splits = {name: {"rows": rows[name], "hash": hashes[name]} for name in sorted(rows)}
    content = {"checks": CHECKS, "splits": splits, "warnings": warnings}
    partial = folder / f"{NAME}.partial"
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(folder / NAME)


def remove(folder: Path) -> None:
    """Takes the stamp away, if there is one."""
    (folder / NAME).unlink(missing_ok=True)


def check(folder: Path, splits: Iterable[str]) -> dict[str, str]:
    """Hash by split if all of `splits` and everything else in the folder was validated as it is now.

    Raises:
        UserError: the folder has no stamp, an older one, or a split was changed, added or removed since.
    """
    again = f"run `python -m data.validate {folder}`"
    try:
        content: dict[str, Any] = json.loads((folder / NAME).read_text())
        stamped = {name: str(split["hash"]) for name, split in content["splits"].items()}
    except FileNotFoundError as error:
        raise UserError(f"{folder}: this data was never validated; {again} first.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / NAME}: not a stamp of data.validate; {again}.") from error
    if content.get("checks") != CHECKS:
        raise UserError(f"{folder}: validated with other checks than today's; {again} again.")
    hashes = {}
    for name in sorted({*splits, *stamped, *(path.stem for path in schema.splits(folder))}):
        hashes[name] = schema.split_hash(folder / f"{name}.parquet")
        if hashes[name] != stamped.get(name):
            raise UserError(f"{folder}: the split {name!r} is not the one that was validated; {again} again.")
    return hashes
