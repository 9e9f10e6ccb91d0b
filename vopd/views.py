"""Views: what a policy sees of a triplet, as chat messages.

Student and teacher differ in their view and in nothing else: both are rendered by the model's one chat template, and
the question's text, which says where to look, is the same in every view of another image. Views that tell the answer
put it behind the question. To add a view, add a function and its name to VIEWS.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

Messages = list[dict[str, Any]]

# OPSD's wording for its teacher (arXiv 2601.18734), behind the question. The miniature's base model is pre-trained with
# these very words (data/miniature/pretrain.py), so that a hinted teacher is not judged on an unfamiliar text.
HINTED = (
    "{question}\n\nHere is a reference solution to this problem:\n{answer}\n\nAfter understanding the "
    "reference solution, please try to solve this problem using your own approach below:"
)


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


def answer_hint(row: Mapping[str, Any]) -> Messages:
    """The full image, and the correct answer as the data has it (a letter): the privileged view of OPSD's teacher."""
    return _ask(row["image"], HINTED.format(question=row["question"], answer=row["answer"]))


def answer_hint_text(row: Mapping[str, Any]) -> Messages:
    """The full image, and the text of the correct option; the answer itself where there are no options."""
    return _ask(row["image"], HINTED.format(question=row["question"], answer=_option_text(row)))


def _option_text(row: Mapping[str, Any]) -> str:
    place = ord(row["answer"]) - ord("A") if len(row["answer"]) == 1 else -1
    if not 0 <= place < len(row["options"]):
        return str(row["answer"])
    # An option may carry its own letter: "A. red", "(A) red".
    return re.sub(rf"^\(?{row['answer']}[.):]\s*", "", row["options"][place])


VIEWS: dict[str, Callable[[Mapping[str, Any]], Messages]] = {
    view.__name__: view for view in (full, crop, noise, answer_hint, answer_hint_text)
}
