"""Does a crop show what the box of the full image encloses? Normalised cross-correlation around the box.

The crop is brought to the box's size and, its rim left out, looked for in a window round the box. The rim is where a
red frame may cover pixels of the full image. The published crops show more than the box, with a frame of their own:
their size tells them (`match_box`). The crop matches if, at most `TOLERANCE` of the box's longer side (and
never less than two pixels) from where it belongs, it correlates to `SCORE` or better, and no place in the window fits
clearly better. Re-encoding (JPEG), enlargement and a change of brightness or contrast stay well above; another place, a
shift beyond the tolerance, or a crop of clearly wider or narrower cut falls below. A crop of (nearly) one colour
correlates with nothing: there the mean difference of grey levels decides.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

SCORE = 0.8
BETTER = 0.03
EXACT = (
    0.01  # instead, for published crops: they are exact copies, and smooth content fits well at a small shift
)
TOLERANCE = 0.05
LEAST_TOLERANCE = 2.0
SIDE = 96  # a larger box is shrunk to this: bounded cost
RIM = 0.15
FLAT = 3.0
FLAT_DIFFERENCE = 16.0
WIDER = 0.05  # a side, twice: from a published box to its frame, and on to the region of its crop
ENLARGED = 2
ROUNDING = (
    3  # pixels of the full image by which a side of that region may differ: how it is rounded is not known
)
FRAME = 5  # pixels: width of the frame in a published crop, before it is enlarged
MARGIN = (1 - 1 / (1 + 2 * WIDER)) / 2  # of a published crop's side, a side: outside of its frame

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Match:
    """score: best correlation within the tolerance (for a flat crop 1 or 0). best: best in the window.
    offset: of that best place from the box, in pixels of the full image (x, y)."""

    matches: bool
    score: float
    best: float
    offset: tuple[float, float]


def widened(box: Box, size: tuple[int, int]) -> Box:
    """The region that a published crop shows: the box, twice wider by `WIDER` a side, cut at the image's border."""
    x0, y0, x1, y1 = box
    growth = ((1 + 2 * WIDER) ** 2 - 1) / 2
    more_x, more_y = growth * (x1 - x0), growth * (y1 - y0)
    return (
        max(0, round(x0 - more_x)), max(0, round(y0 - more_y)),
        min(size[0], round(x1 + more_x)), min(size[1], round(y1 + more_y)),
    )  # fmt: skip


def is_widened(crop: tuple[int, int], box: Box, size: tuple[int, int]) -> bool:
    """Whether a crop of this size (width, height) is that of the widened box, enlarged as published crops are."""
    off = [
        max(
            abs(have - ENLARGED * (high - low))
            for have, low, high in zip(crop, region, region[2:], strict=False)
        )
        for region in (widened(box, size), box)
    ]
    return off[0] <= ENLARGED * ROUNDING and off[0] <= off[1]


def match_box(image: Image.Image, crop: Image.Image, box: Box) -> Match:
    """Whether a crop shows the box, or the region of a published crop if it has that one's size."""
    if is_widened(crop.size, box, image.size):
        return match(image, crop, widened(box, image.size), framed=True)
    return match(image, crop, box)


def match(image: Image.Image, crop: Image.Image, box: Box, framed: bool = False) -> Match:
    """Compare a crop with the region `box` (x0, y0, x1, y1, inside the image) of the full image.

    framed: there is a red frame inside the crop, as in published ones, which is left out as well.
    """
    x0, y0, x1, y1 = box
    scale = min(1.0, SIDE / max(x1 - x0, y1 - y0))
    width, height = max(1, round((x1 - x0) * scale)), max(1, round((y1 - y0) * scale))
    margin = max(8, round(0.25 * max(x1 - x0, y1 - y0)))
    window = (
        max(0, x0 - margin),
        max(0, y0 - margin),
        min(image.width, x1 + margin),
        min(image.height, y1 + margin),
    )
    template = _pixels(crop, None, (width, height))
    size = round((window[2] - window[0]) * scale), round((window[3] - window[1]) * scale)
    field = _pixels(image, window, (max(width, size[0]), max(height, size[1])))
    rim_x, rim_y = _rims(width, height, scale, framed)
    inner = template[rim_y : height - rim_y, rim_x : width - rim_x]
    home = round((x0 - window[0]) * scale) + rim_x, round((y0 - window[1]) * scale) + rim_y
    tolerance = max(LEAST_TOLERANCE, TOLERANCE * max(x1 - x0, y1 - y0))
    reach = int(np.ceil((ROUNDING if framed else tolerance) * scale))
    if inner.std(axis=(0, 1)).max() < FLAT:
        there = field[home[1] : home[1] + inner.shape[0], home[0] : home[0] + inner.shape[1]]
        same = float(np.abs(there.mean(axis=(0, 1)) - inner.mean(axis=(0, 1))).max()) <= FLAT_DIFFERENCE
        same = same and float(there.std(axis=(0, 1)).max()) < 2 * FLAT + 2
        return Match(same, float(same), float(same), (0.0, 0.0))
    scores = np.nan_to_num(cv2.matchTemplate(field, inner, cv2.TM_CCOEFF_NORMED), posinf=0.0, neginf=0.0)
    top, left = max(0, home[1] - reach), max(0, home[0] - reach)
    score = float(scores[top : home[1] + reach + 1, left : home[0] + reach + 1].max(initial=-1.0))
    _, best, _, place = cv2.minMaxLoc(scores)
    offset = (place[0] - home[0]) / scale, (place[1] - home[1]) / scale
    return Match(score >= SCORE and score >= best - (EXACT if framed else BETTER), score, float(best), offset)


def _rims(width: int, height: int, scale: float, framed: bool) -> tuple[int, int]:
    """Pixels of the template to leave out on the left and right, and above and below; at least one is left."""
    rim = round(RIM * min(width, height))
    frame = (FRAME + 1) * scale if framed else 0
    x, y = (max(rim, int(np.ceil(MARGIN * side + frame)) if framed else 0) for side in (width, height))
    return min(x, (width - 1) // 2), min(y, (height - 1) // 2)


def _pixels(picture: Image.Image, region: Box | None, size: tuple[int, int]) -> np.ndarray:
    """(height, width, 3) float32 of a region, brought to `size` (width, height) by area averaging."""
    part = picture.crop(region) if region else picture
    cut = np.asarray(part if part.mode == "RGB" else part.convert("RGB"))
    if (cut.shape[1], cut.shape[0]) != size:
        shrinks = size[0] <= cut.shape[1] and size[1] <= cut.shape[0]
        cut = cv2.resize(cut, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return cut.astype(np.float32)
