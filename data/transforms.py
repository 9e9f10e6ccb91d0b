"""Transforms of a picture or a triplet row with answers that are known exactly, because we draw what is asked about.

Overlays, after PGT: boxes, circles or labelled points are drawn into a window of the picture and become the row's
question. One task a row, and the row takes the place of its original: the number of rows stays. In a row the window
is its box, so that the crop shows the same enlarged and every promise about box and crop still holds.

Rendered text, after LoMo: a span of the question is written under the picture, full view and crop alike, and leaves
the question; what has to be read is then carried by pixels. Such a crop shows more than its box encloses.

Shapes are drawn without anti-aliasing in colours that are not the frame's red.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import schema
from vopd.errors import UserError

COLOURS = {
    "green": (0, 200, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "pink": (255, 0, 255), "cyan": (0, 255, 255)
}  # fmt: skip
LABEL_COLOUR = (255, 255, 255)
SMALLEST_WINDOW = 24
RELATIONS = ("left of", "right of", "above", "below")
CLEARLY_NEARER = 1.25
LETTERS = "ABCD"
POINTER = "[text under the image]"
RENDERED = "rendered text: "  # how the family of such a row begins: its crop shows more than its box
FULL_STRIP, CROP_STRIP = 0.25, 1.0
SHORTEST_SPAN = 2

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Shape:
    """kind: box, circle or point; extent: x0, y0, x1, y1 in pixels of the picture, right and bottom inclusive."""

    kind: str
    colour: str
    extent: Box
    label: str = ""


@dataclass(frozen=True)
class Task:
    """What was drawn, what is asked, and the letter of the right option."""

    name: str
    question: str
    options: tuple[str, ...]
    answer: str
    shapes: tuple[Shape, ...]


def multiple_choice(question: str, options: Sequence[str], hint: str) -> str:
    """The whole text shown to the model: question, one option a line, hint."""
    listed = "\n".join(
        f"{letter}) {option}" for letter, option in zip(schema.letters(options), options, strict=True)
    )
    return f"{question}\n{listed}\n{hint}".rstrip()


def box_relation(window: Box, rng: np.random.Generator) -> Task:
    """Two squares that do not overlap on the asked axis and do on the other: on which side is the first?"""
    x0, y0, side = _square(window)
    first, second = _two_colours(rng)
    relation = int(rng.integers(4))
    half, size = side // 2, max(5, side // 4)
    along = sorted([int(rng.integers(0, half - size)), int(rng.integers(half, side - size))])
    across = int(rng.integers(0, side - size - 1))
    shift = int(rng.integers(0, min(size // 2, side - size - across) + 1))
    if relation in (1, 3):
        along.reverse()
    corners = [(along[0], across), (along[1], across + shift)]
    if relation >= 2:
        corners = [(b, a) for a, b in corners]
    shapes = tuple(
        Shape("box", colour, (x0 + x, y0 + y, x0 + x + size - 1, y0 + y + size - 1))
        for colour, (x, y) in zip((first, second), corners, strict=True)
    )
    question = f"Where is the {first} square as seen from the {second} one?"
    return _task("box relation", question, RELATIONS[relation], RELATIONS, shapes, rng)


def circle_count(window: Box, rng: np.random.Generator) -> Task:
    """Circles of two colours, none touching: how many of the first?"""
    x0, y0, side = _square(window)
    first, second = _two_colours(rng)
    cell = side // 4
    asked, others = int(rng.integers(1, 9)), int(rng.integers(0, 5))
    shapes = []
    for n, place in enumerate(rng.permutation(16)[: asked + others].tolist()):
        x, y = x0 + place % 4 * cell, y0 + place // 4 * cell
        colour = first if n < asked else second
        shapes.append(Shape("circle", colour, (x, y, x + cell - 2, y + cell - 2)))
    question = f"How many {first} circles are there?"
    numbers = tuple(str(n) for n in range(1, 9))
    return _task("circle counting", question, str(asked), numbers, tuple(shapes), rng)


def nearest_point(window: Box, rng: np.random.Generator) -> Task:
    """Four numbered points and one of another colour: which number is nearest to it, by CLEARLY_NEARER at least?"""
    x0, y0, side = _square(window)
    first, second = _two_colours(rng)
    cell = side // 3
    dot = max(2, side // 16)
    distances = [0.0]
    while len(set(distances)) < 2 or sorted(distances)[1] < CLEARLY_NEARER * min(distances):
        places = rng.permutation(9)[:5].tolist()
        spare = max(1, cell - dot - _label_width(cell, dot))
        jitter = rng.integers(0, spare, (5, 2))
        corners = [
            (x0 + p % 3 * cell + int(dx), y0 + p // 3 * cell + int(dy))
            for p, (dx, dy) in zip(places, jitter, strict=True)
        ]
        distances = [float(np.hypot(x - corners[0][0], y - corners[0][1])) for x, y in corners[1:]]
    shapes = tuple(
        Shape("point", second if n == 0 else first, (x, y, x + dot - 1, y + dot - 1), str(n) if n else "")
        for n, (x, y) in enumerate(corners)
    )
    nearest = str(distances.index(min(distances)) + 1)
    question = f"Which numbered point is nearest to the {second} one?"
    return _task("point distance", question, nearest, ("1", "2", "3", "4"), shapes, rng)


TASKS: dict[str, Callable[[Box, np.random.Generator], Task]] = {
    "box relation": box_relation,
    "circle counting": circle_count,
    "point distance": nearest_point,
}


def _square(window: Box) -> tuple[int, int, int]:
    side = min(window[2] - window[0], window[3] - window[1])
    if side < SMALLEST_WINDOW:
        raise UserError(
            f"A window of {side} pixels is too small to draw in; at least {SMALLEST_WINDOW} are needed."
        )
    return window[0], window[1], side


def _two_colours(rng: np.random.Generator) -> tuple[str, str]:
    first, second = rng.permutation(len(COLOURS))[:2].tolist()
    names = list(COLOURS)
    return names[first], names[second]


def _task(
    name: str,
    question: str,
    right: str,
    pool: tuple[str, ...],
    shapes: tuple[Shape, ...],
    rng: np.random.Generator,
) -> Task:
    wrong = [value for value in pool if value != right]
    wrong = [wrong[i] for i in rng.permutation(len(wrong))[:3].tolist()]
    slot = int(rng.integers(4))
    options = (*wrong[:slot], right, *wrong[slot:])
    return Task(name, question, options, LETTERS[slot], shapes)


def _label_width(cell: int, dot: int) -> int:
    return (cell - dot) * 2 // 3


def draw(picture: Image.Image, shapes: tuple[Shape, ...]) -> Image.Image:
    """A copy of an RGB picture with the shapes on it; a point's number is at its lower right."""
    picture = picture.convert("RGB")
    pen = ImageDraw.Draw(picture)
    pen.fontmode = "1"
    for shape in shapes:
        colour = COLOURS[shape.colour]
        if shape.kind == "circle":
            pen.ellipse(shape.extent, fill=colour)
        else:
            pen.rectangle(shape.extent, fill=colour)
        if shape.label:
            dot = shape.extent[2] - shape.extent[0] + 1
            size = max(7, dot * 4)
            corner = (shape.extent[2] + 1, shape.extent[3] + 1 - dot // 2)
            pen.text(corner, shape.label, LABEL_COLOUR, ImageFont.load_default(size), anchor="lt")
    return picture


def overlay(
    picture: Image.Image, window: Box, rng: np.random.Generator, name: str | None = None
) -> tuple[Image.Image, Task]:
    """Draw a task (of TASKS; None: any) into the largest square at the window's upper left corner.

    window: x0, y0, x1, y1 inside the picture, at least SMALLEST_WINDOW pixels a side, else `UserError`.
    """
    task = TASKS[name or list(TASKS)[int(rng.integers(len(TASKS)))]](window, rng)
    return draw(picture, task.shapes), task


def overlay_row(
    row: Mapping[str, Any], rng: np.random.Generator, folder: Path = Path(), name: str | None = None
) -> dict[str, Any]:
    """A row whose question is replaced by an overlay task inside its box; `folder`: what paths in it start from."""
    box: Box = tuple(row["box"])
    image, task = overlay(picture_of(row["image"], folder), box, rng, name)
    changed: dict[str, Any] = {"image": schema.encode(image)}
    clean = image
    if row.get("original"):
        clean = draw(picture_of(row["original"], folder), task.shapes)
        changed["original"] = schema.encode(clean)
    with schema.open_image(row["crop"], folder) as crop:
        size = crop.size
    changed["crop"] = schema.encode(clean.crop(box).resize(size, Image.Resampling.LANCZOS))
    return {
        **row,
        **changed,
        "question": multiple_choice(task.question, task.options, row["hint"]),
        "options": list(task.options),
        "answer": task.answer,
        "answer_type": "letter",
        "family": f"overlay: {task.name}",
    }


def render_row(row: Mapping[str, Any], rng: np.random.Generator, folder: Path = Path()) -> dict[str, Any]:
    """A row with a span of its question's words rendered under image and crop; `folder` as in `overlay_row`.

    Options and hint stay text. The strip is at most FULL_STRIP of the image's height and CROP_STRIP of the crop's;
    the longest span that fits from its first word on is taken. A row whose question is too short stays as it is.
    """
    stem = _stem(row)
    words = stem.split()
    if len(words) < SHORTEST_SPAN:
        return dict(row)
    start = int(rng.integers(0, len(words) - SHORTEST_SPAN + 1))
    stop = int(rng.integers(start + SHORTEST_SPAN, len(words) + 1))
    shares = {"image": FULL_STRIP, "crop": CROP_STRIP}
    views = {column: (picture_of(row[column], folder), share) for column, share in shares.items()}
    while stop > start:
        span = " ".join(words[start:stop])
        strips = {name: strip(span, picture.size, share) for name, (picture, share) in views.items()}
        if all(strips.values()):
            break
        stop -= 1
    else:
        return dict(row)
    changed = {name: schema.encode(_stack(views[name][0], strips[name])) for name in views}
    if row.get("original"):
        changed["original"] = schema.encode(_stack(picture_of(row["original"], folder), strips["image"]))
    rest = " ".join([*words[:start], POINTER, *words[stop:]])
    question = row["question"].replace(stem, rest, 1)
    return {**row, **changed, "question": question, "family": RENDERED + row["family"]}


def _stem(row: Mapping[str, Any]) -> str:
    """The question without options and hint."""
    text = row["question"]
    ends = [text.find(mark) for mark in ("A)", "(A)", "A.", row["hint"]) if mark and text.find(mark) >= 0]
    return text[: min(ends, default=len(text))].strip()


def strip(text: str, size: tuple[int, int], share: float) -> Image.Image | None:
    """Black text on white as wide as a picture of `size`, or None where it would be higher than its `share`."""
    width, height = size
    font = ImageFont.load_default(min(max(10, height // 24), 40))
    widest = max(font.getlength(c) for c in text)
    columns = int(width // widest)
    if not columns:
        return None
    lines = textwrap.wrap(text, max(columns, int(columns * 1.4)))
    if any(font.getlength(line) > width - 2 for line in lines):
        lines = textwrap.wrap(text, columns)
    line_height = sum(font.getmetrics())
    if line_height * len(lines) + 2 > height * share:
        return None
    picture = Image.new("RGB", (width, line_height * len(lines) + 2), (255, 255, 255))
    pen = ImageDraw.Draw(picture)
    for n, line in enumerate(lines):
        pen.text((1, 1 + n * line_height), line, (0, 0, 0), font)
    return picture


def _stack(picture: Image.Image, under: Image.Image | None) -> Image.Image:
    assert under is not None
    both = Image.new("RGB", (picture.width, picture.height + under.height))
    both.paste(picture, (0, 0))
    both.paste(under, (0, picture.height))
    return both


def picture_of(cell: Mapping[str, Any], folder: Path) -> Image.Image:
    """The RGB picture of an image column's cell; `folder` is the one that its path, if it has one, starts from."""
    return schema.decode_image(cell, folder)
