"""Proposers: what stands out is found, boxes stay inside, the same picture gives the same regions."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from data.synthesis import proposers
from vopd.errors import UserError


def overlap(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Intersection over union."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, width) * max(0, height)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


@pytest.mark.parametrize("scale", [1, 3])  # the second is larger than the working size
def test_things_of_another_colour_are_found_first(scale: int) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(90, 130, (300 * scale, 400 * scale, 3), np.uint8))
    things = [(40, 50, 90, 110), (250, 30, 320, 75), (180, 200, 240, 260)]
    things = [tuple(v * scale for v in thing) for thing in things]
    for thing, colour in zip(things, [(220, 30, 30), (30, 60, 220), (240, 230, 40)], strict=True):
        ImageDraw.Draw(image).rectangle((thing[0], thing[1], thing[2] - 1, thing[3] - 1), fill=colour)
    best = [region.box for region in proposers.opencv(image, [])[:8]]
    assert all(max(overlap(box, thing) for box in best) > 0.7 for thing in things)


def test_a_blank_picture_has_no_region() -> None:
    assert proposers.opencv(Image.new("RGB", (200, 100), (120, 130, 140)), []) == []


@settings(max_examples=15)
@given(width=st.integers(1, 300), height=st.integers(1, 300), seed=st.integers(0, 99))
def test_regions_are_inside_scored_and_repeatable(width: int, height: int, seed: int) -> None:
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)
    regions = proposers.opencv(image, [])
    assert regions == proposers.opencv(image, [])
    assert [r.score for r in regions] == sorted((r.score for r in regions), reverse=True)
    for region in regions:
        x0, y0, x1, y1 = region.box
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height and 0 < region.score <= 1


def test_a_photograph_has_regions_of_use() -> None:
    with Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png") as image:
        regions = proposers.opencv(image, [])
    patch = (133, 345, 210, 415)  # the mission patch on her sleeve
    assert max(overlap(r.box, patch) for r in regions if r.score >= 0.75) > 0.6


def test_detections_become_regions_inside_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def pipeline(task: str, model: str) -> Any:
        assert (task, model) == ("zero-shot-object-detection", "some/detector")
        hits = [("cup", 0.4, (-3, 2, 20, 30)), ("spoon", 0.9, (10, 10, 70, 500))]
        return lambda image, candidate_labels: [
            {
                "label": label,
                "score": score,
                "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)),
            }
            for label, score, box in hits
            if label in candidate_labels
        ]

    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(pipeline=pipeline))
    proposer = proposers.build("zero_shot_detection", "some/detector")
    image = Image.new("RGB", (60, 50))
    assert proposer.needs_labels and proposer.propose(image, []) == []
    assert proposer.propose(image, ["cup", "spoon"]) == [
        proposers.Region((10, 10, 60, 50), 0.9, "spoon"),
        proposers.Region((0, 2, 20, 30), 0.4, "cup"),
    ]


def test_a_detector_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"propose\.detector="):
        proposers.build("zero_shot_detection", str(tmp_path))
