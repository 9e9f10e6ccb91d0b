"""Questions that a method fixed and broke relative to base, with both pictures and both responses.

A question counts as fixed where base was incorrect and the method is correct in more than half of the method's seeds,
and as broken the other way round. Which of them are shown is decided by a hash of a seed and the question, not by
looks, and equally for all methods, so that methods can be compared on the same questions. Pictures come from the data
folder the runs were trained from, if its hash is still theirs; they are bounded in number, size and bytes.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from data import schema, validation_stamp
from vopd.common import images as pictures
from vopd.common import provenance
from vopd.config import ROOT
from vopd.errors import UserError
from vopd.evaluation.records import Record
from vopd.report.estimates import Group
from vopd.report.run_folders import Run

OUTCOMES = ("fixed", "broken")
SHOWN = 24
"""Most questions a method and outcome."""
SIDE = 448
PICTURE_BYTES = 48 * 1024
"""A picture with longer sides (pixels) or more bytes is shrunk."""
PAGE_BYTES = 16 * 2**20
"""Of all pictures together, as files; what comes after that has its text alone."""
TEXT = 1200
"""Most characters shown of a response or prompt."""


@dataclass(frozen=True)
class Card:
    """One question under one method. image, crop: keys of Gallery.pictures, None where there is none to show.

    seeds: "2 of 3": in how many of the method's seeds the outcome holds; the response is the first such seed's.
    """

    method: str
    outcome: str
    split: str
    family: str
    id: str
    prompt: str
    gold: str
    seeds: str
    seed: int
    before: str
    before_read: str | None
    after: str
    after_read: str | None
    image: str | None
    crop: str | None
    box: str


@dataclass(frozen=True)
class Gallery:
    """Cards by method and outcome; totals: (method, outcome) -> how many there are; pictures: key -> data URI; why:
    the reason for missing pictures, empty where all are there."""

    cards: list[Card]
    totals: dict[tuple[str, str], int]
    pictures: dict[str, str]
    why: str


@dataclass(frozen=True)
class _Chosen:
    group: Group
    outcome: str
    run: Run
    before: Record
    after: Record
    held: int


def make(groups: Sequence[Group], shown: int = SHOWN, seed: int = 0) -> Gallery:
    """The gallery of all methods; `shown` cards at most a method and outcome, chosen by `seed`."""
    chosen: list[_Chosen] = []
    totals: dict[tuple[str, str], int] = {}
    for group in groups:
        for outcome, found in _outcomes(group).items():
            totals[group.name, outcome] = len(found)
            chosen += sorted(found, key=lambda item: _order(seed, item.after.split, item.after.id))[:shown]
    pictures, boxes, why = _pictures(chosen)
    return Gallery([_card(item, pictures, boxes) for item in chosen], totals, pictures, why)


def _order(seed: int, split: str, question: str) -> str:
    return hashlib.sha256(f"{seed}\0{split}\0{question}".encode()).hexdigest()


def _outcomes(group: Group) -> dict[str, list[_Chosen]]:
    held: dict[tuple[str, str, str], list[tuple[Run, Record, Record]]] = {}
    for run in group.runs:
        before = {(r.split, r.id): r for r in run.before if r.view == "full"}
        for after in run.after:
            first = before.get((after.split, after.id))
            if after.view == "full" and first is not None and first.correct != after.correct:
                outcome = "fixed" if after.correct else "broken"
                held.setdefault((outcome, after.split, after.id), []).append((run, first, after))
    found: dict[str, list[_Chosen]] = {outcome: [] for outcome in OUTCOMES}
    for (outcome, *_), items in held.items():
        if 2 * len(items) > len(group.runs):
            found[outcome].append(_Chosen(group, outcome, *items[0], len(items)))
    return found


def _card(item: _Chosen, pictures: Mapping[str, str], boxes: Mapping[str, str]) -> Card:
    keys = [_key(item.after, column) for column in schema.IMAGES]
    image, crop = (key if key in pictures else None for key in keys)
    return Card(
        method=item.group.name,
        outcome=item.outcome,
        split=item.after.split,
        family=item.after.family,
        id=item.after.id,
        prompt=_cut(item.after.prompt),
        gold=item.after.gold,
        seeds=f"{item.held} of {len(item.group.runs)}",
        seed=item.run.seed,
        before=_cut(item.before.response),
        before_read=item.before.parsed,
        after=_cut(item.after.response),
        after_read=item.after.parsed,
        image=image,
        crop=crop,
        box=boxes.get(_key(item.after, "box"), ""),
    )


def _cut(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[:TEXT]} ... ({len(text) - TEXT:,} characters more)"


def _key(record: Record, column: str) -> str:
    return f"{record.split}/{record.id}/{column}"


# ---- pictures -------------------------------------------------------------------------------------------------------


def _pictures(chosen: Sequence[_Chosen]) -> tuple[dict[str, str], dict[str, str], str]:
    """Data URIs and boxes of the chosen questions by key, and why pictures are missing."""
    pictures: dict[str, str] = {}
    boxes: dict[str, str] = {}
    if not chosen:
        return pictures, boxes, ""
    run = chosen[0].run
    folder = ROOT / str(run.facts["settings"]["data"]["folder"])
    try:
        _check(folder, run)
        # In turn over methods and outcomes, so that a full page lacks the last cards of each, not one method's.
        wanted = list(dict.fromkeys((c.after.split, c.after.id) for c in _in_turn(chosen)))
        rows = _rows(folder, wanted)
    except UserError as error:
        return pictures, boxes, f"No pictures: {error}"
    held = 0
    for split, name in wanted:
        row = rows.get((split, name))
        if row is None:
            continue
        boxes[f"{split}/{name}/box"] = ", ".join(map(str, row["box"]))
        for column in schema.IMAGES:
            media, content = _small(row[column], folder)
            held += len(content)
            if held > PAGE_BYTES:
                return (
                    pictures,
                    boxes,
                    f"Some pictures are left out: a page holds {PAGE_BYTES >> 20} MiB of them.",
                )
            pictures[f"{split}/{name}/{column}"] = f"data:{media};base64,{base64.b64encode(content).decode()}"
    return pictures, boxes, ""


def _check(folder: Path, run: Run) -> None:
    splits = [path.stem for path in schema.splits(folder)] if folder.is_dir() else []
    if not splits:
        raise UserError(f"the data is not in {folder.name}; prepare it, then make the page again.")
    if provenance.hash_json(validation_stamp.check(folder, splits)) != run.facts["data_hash"]:
        raise UserError(f"the data in {folder.name} is not what the runs were made from.")


def _in_turn(chosen: Sequence[_Chosen]) -> Iterable[_Chosen]:
    places: dict[tuple[str, str], int] = {}
    numbered = []
    for item in chosen:
        key = (item.group.name, item.outcome)
        places[key] = places.get(key, -1) + 1
        numbered.append((places[key], item))
    return (item for _, item in sorted(numbered, key=lambda pair: pair[0]))


def _rows(folder: Path, wanted: Sequence[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    found = {}
    for split in sorted({split for split, _ in wanted}):
        ids = {name for other, name in wanted if other == split}
        path = folder / f"{split}.parquet"
        for row in schema.rows(path, ("id", "box", *schema.IMAGES)):
            if row["id"] in ids:
                found[split, str(row["id"])] = row
    return found


def _small(cell: Mapping[str, Any], folder: Path) -> tuple[str, bytes]:
    """The picture as the models saw it, as (media type, file): shrunk where it is not small."""
    file = pictures.portable(schema.image_bytes(cell, folder))
    if len(file.content) <= PICTURE_BYTES and max(file.shown.size) <= SIDE:
        return file.media, file.content
    side = min(SIDE, max(file.shown.size))
    while True:
        buffer = io.BytesIO()
        ImageOps.contain(file.shown, (side, side), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=85)
        if buffer.tell() <= PICTURE_BYTES or side <= 64:
            return "image/jpeg", buffer.getvalue()
        side = side * 3 // 4
