"""What a published `bbox` means, and whether a row's pictures show it there.

Stated, after public code that ran on the real files (we read that code and have not seen the files): x0, y0, x1, y1 in
pixels of the full image, right and bottom exclusive. The box was widened by 5% a side, a red frame drawn there, widened
by 5% a side again, cut at the image's border; that region, enlarged twice with Lanczos, is the crop. Rounding is not
known, so a crop may be off by a few pixels. Every row is held to it; that the crop shows the region's content is for
`data.validate`.
"""

from typing import Any

import numpy as np
from PIL import Image

from data import crop_match

Box = tuple[int, int, int, int]
MEANING = "x0, y0, x1, y1 in pixels"
_REACH = 0.15  # of the box's longer side: how far outside it the frame may be drawn
_LONG = 0.6  # of a side's length that has to be red


def box_of(bbox: Any, width: int, height: int) -> Box:
    """The four whole numbers of a published `bbox`; `ValueError` unless they are a box inside the image."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise ValueError("bbox is not four numbers")
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and n == n // 1 for n in bbox):
        raise ValueError("bbox is not four whole numbers of pixels")
    x0, y0, x1, y1 = (int(n) for n in bbox)
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(f"bbox {[x0, y0, x1, y1]} is not inside the image of {width} x {height}")
    return x0, y0, x1, y1


def problem(image: Image.Image, crop: Image.Image, box: Box) -> str | None:
    """What speaks against the stated meaning of `box`: the crop's size, or a red frame that is missing."""
    if not crop_match.is_widened(crop.size, box, image.size):
        x0, y0, x1, y1 = crop_match.widened(box, image.size)
        return (
            f"the crop has {crop.width} x {crop.height} pixels; bbox, widened and enlarged as published, has "
            f"{crop_match.ENLARGED * (x1 - x0)} x {crop_match.ENLARGED * (y1 - y0)}"
        )
    if not has_red_frame(image, box):
        return "there is no red frame around bbox in the image"
    if not _crop_has_red_frame(crop):
        return "there is no red frame in the crop"
    return None


def has_red_frame(image: Image.Image, box: Box) -> bool:
    """Whether a red line runs along the box: on all but one of its sides, those at the image's border left aside.

    The line may be inside the box by a twentieth of its longer side, or outside it by `_REACH`.
    """
    x0, y0, x1, y1 = box
    longer = max(x1 - x0, y1 - y0)
    inside, outside = max(4, round(longer / 20)), max(8, round(_REACH * longer))
    left, top = max(0, x0 - outside), max(0, y0 - outside)
    near = image.crop((left, top, min(image.width, x1 + outside), min(image.height, y1 + outside)))
    free = sum((x0 > outside, y0 > outside, x1 < image.width - outside, y1 < image.height - outside))
    box = (x0 - left, y0 - top, x1 - left, y1 - top)
    return _red_sides(near, box, inside) >= max(2, min(3, free))


def _crop_has_red_frame(crop: Image.Image) -> bool:
    """As above, within the margin of a crop; on at least two sides, for the region may be cut at the border."""
    width, height = crop.size
    x, y = (round(crop_match.MARGIN * side) for side in crop.size)
    return _red_sides(crop, (x, y, width - x, height - y), crop_match.ENLARGED * (crop_match.FRAME + 1)) >= 2


def _red_sides(picture: Image.Image, box: Box, inside: int) -> int:
    """Number of sides along which a row or column of pixels, at most `inside` within the box, is red."""
    (x0, y0, x1, y1), (width, height) = box, picture.size
    columns = (0, y0, min(width, x0 + inside), y1), (max(0, x1 - inside), y0, width, y1)
    rows = (x0, 0, x1, min(height, y0 + inside)), (x0, max(0, y1 - inside), x1, height)
    lines = [_red(picture, strip).mean(axis=0) for strip in columns]
    lines += [_red(picture, strip).mean(axis=1) for strip in rows]
    return sum(float(line.max()) >= _LONG for line in lines)


def _red(picture: Image.Image, region: Box) -> np.ndarray:
    """(height, width) bool: which pixels of a region are red."""
    pixels = np.asarray(picture.crop(region).convert("RGB")).astype(np.int16)
    return (pixels[..., 0] >= 140) & (pixels[..., 0] - pixels[..., 1:].max(axis=-1) >= 70)
