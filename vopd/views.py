"""Views: what a policy sees of a triplet, as chat messages.

Student and teacher differ in their view and in nothing else: the question's text, hint included, is the same, and
both are rendered by the model's one chat template. To add a view, add a function and its name to VIEWS.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

Messages = list[dict[str, Any]]


def _ask(image: Image.Image, text: str) -> Messages:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def full(row: Mapping[str, Any]) -> Messages:
    """The full image with the red box drawn: what the student sees, in training and in use."""
    return _ask(row["image"], row["question"])


def crop(row: Mapping[str, Any]) -> Messages:
    """The enlarged region alone: the privileged view of Vision-OPD's teacher (paper, section 3.2)."""
    return _ask(row["crop"], row["question"])


def noise(row: Mapping[str, Any]) -> Messages:
    """Gaussian noise of the crop's size: the control that shows whether the crop's content matters."""
    rng = np.random.default_rng(zlib.crc32(row["id"].encode()))
    width, height = row["crop"].size
    pixels = np.clip(rng.normal(127.5, 50.0, (height, width, 3)), 0, 255).astype(np.uint8)
    return _ask(Image.fromarray(pixels), row["question"])


VIEWS: dict[str, Callable[[Mapping[str, Any]], Messages]] = {"full": full, "crop": crop, "noise": noise}
