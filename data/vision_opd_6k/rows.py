"""One line of train.jsonl becomes a triplet that passes validation, or a reason why not; called in worker processes.

Every picture is read once: its bytes are hashed and decoded, and the pixels serve the check of the box, validation's
checks and the perceptual hash. The result says which files these were, so that it can be kept: `holds` tells later
whether the files are still the same.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from data import schema, validate
from data.vision_opd_6k import boxes, source
from data.vision_opd_6k.archive import safe_name
from data.vision_opd_6k.question import read_question
from vopd.common import control_tokens, images
from vopd.errors import UserError

LICENCE = f"as stated on the card of {source.HUB_ID}"
MARKERS = control_tokens.pattern()


def read(out: Path, revision: str, numbered: tuple[int, str]) -> dict[str, Any]:
    """What a line (its number from 0, its text) becomes, with pictures from `out`.

    {"row", "hash", "pictures"}: the triplet without its split, the image's perceptual hash, and `_Pictures.files`; or
    {"id", "line", "reason"} if it fails.
    """
    number, line = numbered
    id_ = f"vision-opd-6k-{number:06d}"
    pictures = _Pictures(out)
    try:
        published = _parse(line)
        row = _row(published, id_, f"{revision}, {source.ROWS_FILE} line {number + 1}", pictures)
        checks = partial(validate.picture_problems, decode=pictures.decode)
        found, hash_ = validate.row_problems(row | {"split": "train"}, out, "train", MARKERS, checks)
        if blocking := [f"{kind}: {reason}" for kind, reason in found if kind in validate.BLOCKING]:
            raise ValueError("; ".join(blocking))
    except (ValueError, UserError) as error:
        return {"id": id_, "line": number + 1, "reason": str(error)}
    return {"hash": hash_, "row": row, "pictures": pictures.files}


def holds(result: Mapping[str, Any], out: Path) -> bool:
    """Whether the pictures of a result are the files that were decoded for it: not touched since, or equal in content
    (as in a folder that was copied)."""
    try:
        return all(
            _state((out / path).stat()) == known["state"]
            or hashlib.sha256((out / path).read_bytes()).hexdigest() == known["sha256"]
            for path, known in result.get("pictures", {}).items()
        )
    except OSError:
        return False


class _Pictures:
    """A row's pictures, each read and decoded once. files: state and sha256 of what was decoded, by path."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.files: dict[str, dict[str, Any]] = {}
        self._decoded: dict[str, Image.Image] = {}

    def cell(self, name: str, given: Any) -> dict[str, Any]:
        """The cell for a path in a published row; archives may or may not hold the folder's name. `ValueError`."""
        if not isinstance(given, list) or len(given) != 1 or not isinstance(given[0], str):
            raise ValueError(f"{name} is not a list of one path")
        path = safe_name(given[0])
        inner = path.relative_to(name) if path.parts[0] == name and len(path.parts) > 1 else path
        for candidate in (Path(name) / inner, Path(name) / path):
            if (self.out / candidate).is_file():
                return {"bytes": None, "path": candidate.as_posix()}
        raise ValueError(f"{given[0]} is not in the archive")

    def decode(self, cell: Mapping[str, Any], folder: Path) -> Image.Image:
        """As `schema.decode_image`."""
        path = cell["path"]
        if path not in self._decoded:
            file = schema.image_file(path, folder)
            state, content = _state(file.stat()), images.read(file)
            self._decoded[path] = images.decode(content)
            self.files[path] = {"state": state, "sha256": hashlib.sha256(content).hexdigest()}
        return self._decoded[path]


def _state(found: os.stat_result) -> list[int]:
    """What changes when a file is touched; no tool sets the time of change (ctime) back."""
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _row(published: dict[str, Any], id_: str, provenance: str, pictures: _Pictures) -> dict[str, Any]:
    """A published row as a triplet whose box has the stated meaning; `ValueError`, `UserError`."""
    for key in ("problem", "answer"):
        if not isinstance(published.get(key), str):
            raise ValueError(f"{key} is not a text")
        published[key].encode()  # a half of a surrogate pair, which no file of ours can hold, is a ValueError
    question = read_question(published["problem"], published["answer"])
    cells = {
        column: pictures.cell(name, published.get(name))
        for column, name in (("image", "images"), ("crop", "teacher_images"))
    }
    image, crop = (pictures.decode(cells[column], pictures.out) for column in ("image", "crop"))
    box = boxes.box_of(published.get("bbox"), *image.size)
    if wrong := boxes.problem(image, crop, box):
        raise ValueError(wrong)
    return cells | {
        "id": id_,
        "original": _original(published, pictures),
        "box": list(box),
        "question": question.text,
        "hint": question.hint,
        "options": list(question.options),
        "answer": question.answer,
        "answer_type": "letter",
        "family": "multiple choice",
        "source": source.HUB_ID,
        "licence": LICENCE,
        "provenance": provenance,
    }


def _original(published: dict[str, Any], pictures: _Pictures) -> dict[str, Any] | None:
    """The picture without the box, where there is one: nothing needs it."""
    name = source.ORIGINALS[0]
    try:
        return pictures.cell(name, published.get(name))
    except ValueError:
        return None


def _parse(line: str) -> dict[str, Any]:
    """A line's JSON object; `ValueError` (which JSON errors are) for anything else."""
    try:
        content = json.loads(line)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content
