"""A data set that is there already: whether a preparer has to be called for it, and whose it is.

A preparer (`data.prepare`, called as `python -m PREPARER --out FOLDER`) is for an empty folder, or one that it made
itself. Any other set is the user's: it is used as it is if it was validated, and otherwise refused.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data import schema, validation_stamp
from vopd.common import ownership
from vopd.errors import UserError

MINIATURE = "data.miniature.prepare"
VISION_OPD_6K = "data.vision_opd_6k.prepare"
META = "meta.json"


def needs_preparing(folder: Path, preparer: str) -> bool:
    """Whether `preparer` is to be called: it makes what is missing, and keeps its own set if nothing changed.

    Raises:
        UserError: the folder holds something of another origin that was never validated.
    """
    if ownership.is_empty(folder) or ownership.belongs(folder, preparer, EARLIER.get(preparer)):
        return True
    if not (folder / validation_stamp.NAME).is_file():
        raise UserError(
            f"{folder}: {preparer} did not create its content and leaves it unchanged; if it is a data set, run "
            f"`vopd data validate {folder}` first (with data.prepare=null nothing is prepared)."
        )
    return False


def meta_of(folder: Path) -> dict[str, Any]:
    """What a preparer noted in meta.json; empty if there is none that can be read."""
    try:
        content = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def digest(file: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---- sets that were made before there were ledgers ------------------------------------------------------------------


def _miniature(file: Path) -> bool:
    meta = meta_of(file.parent)
    if not {"rows", "seed", "code", "sha256"} <= meta.keys() or not isinstance(meta["sha256"], dict):
        return False
    if file.name in (META, validation_stamp.NAME) or file.suffix == ".partial":
        return True
    return file.suffix == ".parquet" and meta["sha256"].get(file.stem) == digest(file)


def _vision_opd_6k(file: Path) -> bool:
    folder = file.parent
    if not (folder / "source.json").is_file() or not (folder / "work").is_dir():
        return False
    if file.suffix != ".parquet":
        return (
            file.name in (META, validation_stamp.NAME, "source.json", "left_out.jsonl")
            or file.suffix == ".partial"
        )
    try:
        stamped = json.loads((folder / validation_stamp.NAME).read_text(encoding="utf-8"))["splits"]
        return bool(stamped[file.stem]["hash"] == schema.split_hash(file))
    except FileNotFoundError:
        return file.stem in ("train", "validation", "test")  # interrupted before it was validated
    except (OSError, ValueError, TypeError, KeyError):
        return False


EARLIER: Mapping[str, ownership.Recognise] = {MINIATURE: _miniature, VISION_OPD_6K: _vision_opd_6k}
