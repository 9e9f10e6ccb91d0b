"""Region proposers behind one call: an RGB image and object names in, scored boxes out.

`opencv` needs no weights: stable blobs (MSER) and closed edges, ranked by how much their colours differ from those
of the ring around them, the colour-contrast cue of Alexe et al., "Measuring the objectness of image windows" (2012).
`zero_shot_detection` is a transformers pipeline; its object names come from a multimodal model, as in ZwZ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from vopd.errors import UserError

WORKING_SIDE = 640
SMALLEST = 8
OVERLAP = 0.4
RING = 0.4


@dataclass(frozen=True)
class Region:
    """box: x0, y0, x1, y1 in pixels, right and bottom exclusive; score: 0 to 1; label: empty when unnamed."""

    box: tuple[int, int, int, int]
    score: float
    label: str = ""


@dataclass(frozen=True)
class Proposer:
    """propose: (image, labels) -> regions, best first; needs_labels: whether it must be told what to look for."""

    propose: Callable[[Image.Image, list[str]], list[Region]]
    needs_labels: bool


def opencv(image: Image.Image, labels: list[str]) -> list[Region]:
    """Regions that stand out by colour. Deterministic; `labels` is not used.

    Contrast has no scale that holds for every image, so the score is a rank: 0.75 means that three quarters of the
    image's regions stand out less.
    """
    scale = min(1.0, WORKING_SIDE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if min(size) < SMALLEST:
        return []
    lab = cv2.cvtColor(np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX)), cv2.COLOR_RGB2LAB)
    boxes = _candidates(lab)
    if not boxes:
        return []
    codes = (lab // 32).astype(np.int64) @ np.array([64, 8, 1])
    scores = [_contrast(codes, box) for box in boxes]
    corners = [[x, y, w, h] for x, y, w, h in boxes]
    kept = np.asarray(cv2.dnn.NMSBoxes(corners, scores, 0.0, OVERLAP)).reshape(-1).tolist()
    found = []
    for rank, i in enumerate(kept):  # by falling contrast
        x, y, w, h = (round(v / scale) for v in boxes[i])
        box = (x, y, min(image.width, x + w), min(image.height, y + h))
        found.append(Region(box, round(1 - rank / len(kept), 4)))
    return found


def _candidates(lab: np.ndarray) -> list[tuple[int, int, int, int]]:
    """x, y, width, height of blobs and closed contours; lab: (height, width, 3) uint8."""
    height, width = lab.shape[:2]
    boxes: set[tuple[int, int, int, int]] = set()
    for channel in cv2.split(lab):
        channel = cv2.normalize(channel, None, 0, 255, cv2.NORM_MINMAX)
        mser = cv2.MSER_create(
            delta=5, min_area=SMALLEST**2, max_area=max(SMALLEST**2 + 1, height * width // 8)
        )
        boxes |= {tuple(map(int, box)) for box in mser.detectRegions(channel)[1]}
        edges = cv2.dilate(cv2.Canny(channel, 60, 160), np.ones((3, 3), np.uint8))
        contours, _ = cv2.findContours(edges, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
        boxes |= {tuple(map(int, cv2.boundingRect(contour))) for contour in contours}
    return sorted(b for b in boxes if min(b[2:]) >= SMALLEST and b[2] * b[3] < height * width / 4)


def _contrast(codes: np.ndarray, box: tuple[int, int, int, int]) -> float:
    """Hellinger distance, 0 to 1, of the colours in a box and in its ring: 0 the same colours, 1 none in common.

    codes: (height, width) ints in 0..511, one a coarse Lab colour.
    """
    x, y, w, h = box
    mx, my = max(2, int(w * RING / 2)), max(2, int(h * RING / 2))
    outer = codes[max(0, y - my) : y + h + my, max(0, x - mx) : x + w + mx]
    inside = np.bincount(codes[y : y + h, x : x + w].ravel(), minlength=512)
    ring = np.bincount(outer.ravel(), minlength=512) - inside
    if not ring.sum():
        return 0.0
    shared = np.sqrt(inside / inside.sum() * ring / ring.sum()).sum()
    return float(np.sqrt(max(0.0, 1 - shared)))


def zero_shot_detection(model: str) -> Callable[[Image.Image, list[str]], list[Region]]:
    """A detector from the hub or a folder; raises `UserError` when it cannot be loaded."""
    from transformers import pipeline

    try:
        detect = pipeline("zero-shot-object-detection", model=model)
    except (OSError, ValueError) as error:
        raise UserError(f"propose.detector={model}: not a detector that can be loaded ({error}).") from error

    def propose(image: Image.Image, labels: list[str]) -> list[Region]:
        if not labels:
            return []
        found = []
        for hit in detect(image, candidate_labels=labels):
            x0, y0, x1, y1 = (hit["box"][k] for k in ("xmin", "ymin", "xmax", "ymax"))
            box = (max(0, x0), max(0, y0), min(image.width, x1), min(image.height, y1))
            if box[0] < box[2] and box[1] < box[3]:  # a box may be outside the picture, or round to nothing
                found.append(Region(box, round(float(hit["score"]), 4), hit["label"]))
        return sorted(found, key=lambda r: (-r.score, r.box))

    return propose


PROPOSERS = {"opencv", "zero_shot_detection"}


def build(name: str, detector: str) -> Proposer:
    """The proposer of a name of PROPOSERS."""
    if name == "opencv":
        return Proposer(opencv, needs_labels=False)
    return Proposer(zero_shot_detection(detector), needs_labels=True)
