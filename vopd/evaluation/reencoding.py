"""Pictures as the paper's evaluation sends those of V*: a PNG, made smaller until it has at most 20 MiB.

Read in public copies of its inference code, second hand. A server gets other bytes than the published JPEG, and its
model other pixels only where a PNG was too large.
"""

from __future__ import annotations

import io

from PIL import Image

from vopd.common import images

MOST_BYTES = 20 * 2**20
SHRINK = 0.75
LEAST_SIDE = 100
"""Pixels; a picture with a side of no more is left as large as it is."""


def reencoded(content: bytes, formats: tuple[str, ...]) -> bytes:
    """The PNG of an encoded picture; errors as `images.decode`."""
    shown = images.decode(content, formats)
    png = _png(shown)
    while len(png) > MOST_BYTES and min(shown.size) > LEAST_SIDE:
        width, height = (int(side * SHRINK) for side in shown.size)
        shown = shown.resize((width, height), Image.Resampling.LANCZOS)
        png = _png(shown)
    return png


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")  # Pillow's own compression, for the limit is on the file's size
    return buffer.getvalue()
