"""Finds out what the published `bbox` numbers mean, by looking: the red frame and the crop tell where the box is.

The format is not documented. Each usual reading of the four numbers, with the box as it is or drawn somewhat wider than
the crop, is tried on a sample of rows; one counts as correct for a row if the crop is found there in the full image and
a red frame is drawn around it. One reading must fit nearly every row of the sample, or there is an error.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from data import crop_match
from vopd.errors import UserError

Box = tuple[int, int, int, int]
ENOUGH = 0.9
_REACH = 0.15  # of the box's longer side: how far outside it the frame may be drawn
_READINGS: dict[str, Callable[[Sequence[float], int, int], tuple[float, float, float, float]]] = {
    "x0, y0, x1, y1 in pixels": lambda b, w, h: (b[0], b[1], b[2], b[3]),
    "x, y, width, height in pixels": lambda b, w, h: (b[0], b[1], b[0] + b[2], b[1] + b[3]),
    "x0, y0, x1, y1 as fractions": lambda b, w, h: (b[0] * w, b[1] * h, b[2] * w, b[3] * h),
    "x0, y0, x1, y1 in thousandths": lambda b, w, h: (
        b[0] * w / 1000, b[1] * h / 1000, b[2] * w / 1000, b[3] * h / 1000,
    ),
    "y0, x0, y1, x1 in thousandths": lambda b, w, h: (
        b[1] * w / 1000, b[0] * h / 1000, b[3] * w / 1000, b[2] * h / 1000,
    ),
}  # fmt: skip
_GROWTHS = (1.0, 1 / 1.05, 1 / 1.1, 1.05, 1.1)


@dataclass(frozen=True)
class Reading:
    """How to read a bbox: what the numbers are, and how much wider than they say the crop was cut."""

    name: str
    growth: float

    def box(self, numbers: Sequence[float], width: int, height: int) -> Box | None:
        """The region the crop shows, in whole pixels; None if it is empty or outside the image."""
        x0, y0, x1, y1 = _READINGS[self.name](numbers, width, height)
        more_x, more_y = (x1 - x0) * (self.growth - 1) / 2, (y1 - y0) * (self.growth - 1) / 2
        slack = 2 + 0.1 * max(x1 - x0, y1 - y0)
        if x0 < -slack or y0 < -slack or x1 > width + slack or y1 > height + slack:
            return None
        box = (
            max(0, round(x0 - more_x)), max(0, round(y0 - more_y)),
            min(width, round(x1 + more_x)), min(height, round(y1 + more_y)),
        )  # fmt: skip
        return box if box[2] - box[0] >= 4 and box[3] - box[1] >= 4 else None

    def __str__(self) -> str:
        return self.name if self.growth == 1 else f"{self.name}, times {self.growth:.2f}"


READINGS = tuple(Reading(name, growth) for name in _READINGS for growth in _GROWTHS)


def numbers_of(bbox: Any) -> list[float]:
    """Four finite numbers from a list, a list of one list, or their JSON text; `ValueError` else."""
    if isinstance(bbox, str):
        bbox = json.loads(bbox)
    if isinstance(bbox, list) and len(bbox) == 1:
        bbox = bbox[0]
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(isinstance(n, int | float) for n in bbox):
        raise ValueError("bbox is not four numbers")
    if not np.isfinite(bbox).all() or max(abs(n) for n in bbox) > 1e6:
        raise ValueError("bbox holds numbers that are not coordinates")
    return [float(n) for n in bbox]


def problem(image: Image.Image, crop: Image.Image, box: Box | None) -> tuple[str | None, float]:
    """What speaks against `box` (None: nothing), and how well the crop fits there (correlation)."""
    if box is None:
        return "bbox is not inside the image", -1.0
    match = crop_match.match(image, crop, box)
    if not match.matches:
        return f"the crop is not what bbox encloses (correlation {match.score:.2f})", match.score
    if not has_red_frame(image, box):
        return "there is no red frame around bbox", match.score
    return None, match.score


def has_red_frame(image: Image.Image, box: Box) -> bool:
    """Whether a red line runs along at least three sides of the box (or all those inside the image).

    The line may be inside the box by a twentieth of its longer side, or outside it by `_REACH`.
    """
    x0, y0, x1, y1 = box
    inside, outside = (
        max(4, round((max(x1 - x0, y1 - y0)) / 20)),
        max(8, round(_REACH * max(x1 - x0, y1 - y0))),
    )
    left, top = max(0, x0 - outside), max(0, y0 - outside)
    near = image.crop((left, top, min(image.width, x1 + outside), min(image.height, y1 + outside)))
    pixels = np.asarray(near.convert("RGB")).astype(np.int16)
    red_HW = (pixels[..., 0] >= 140) & (pixels[..., 0] - pixels[..., 1:].max(axis=-1) >= 70)
    x0, y0, x1, y1 = x0 - left, y0 - top, x1 - left, y1 - top
    columns_W, rows_H = red_HW[y0:y1].mean(axis=0), red_HW[:, x0:x1].mean(axis=1)
    strips = (
        columns_W[: x0 + inside],
        columns_W[x1 - inside :],
        rows_H[: y0 + inside],
        rows_H[y1 - inside :],
    )
    return sum(float(strip.max(initial=0.0)) >= 0.6 for strip in strips) >= 3


def find_reading(rows: Iterable[tuple[list[float], Image.Image, Image.Image]]) -> Reading:
    """The reading that fits a sample of (bbox numbers, full image, crop).

    Raises:
        UserError: none fits nine tenths of the sample; says which came nearest.
    """
    fits = dict.fromkeys(READINGS, 0)
    scores = dict.fromkeys(READINGS, 0.0)
    count = 0
    for numbers, image, crop in rows:
        count += 1
        for reading in READINGS:
            wrong, score = problem(image, crop, reading.box(numbers, *image.size))
            fits[reading] += wrong is None
            scores[reading] += score
    best = max(READINGS, key=lambda r: (fits[r], scores[r]))
    if count == 0 or fits[best] < ENOUGH * count:
        raise UserError(
            f"bbox: its meaning cannot be verified. Of {count} sampled rows, the best reading ({best}) puts the crop "
            f"and a red frame where they are in {fits[best]}; nothing is converted on a guess."
        )
    return best
