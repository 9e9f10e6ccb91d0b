"""The generated world: determinism, disjoint splits, geometry, balance."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.miniature import world
from data.miniature.responses import scene_response


def scenes(split: str, count: int) -> list[world.Scene]:
    families = (world.HOLDOUT_FAMILY,) if split == "holdout" else world.FAMILIES
    return [world.scene(0, split, i, families) for i in range(count)]


def test_same_seed_same_pixels_and_text() -> None:
    a, b = world.scene(3, "train", 11), world.scene(3, "train", 11)
    assert np.array_equal(a.image, b.image) and np.array_equal(a.crop, b.crop)
    assert (a.question, a.answer, a.facts, a.box) == (b.question, b.answer, b.facts, b.box)
    assert not np.array_equal(a.image, world.scene(4, "train", 11).image)


def test_pixels_are_those_of_the_shipped_version() -> None:
    """The shipped model was trained on these pictures: a change of the drawing code needs new weights."""
    digest = hashlib.sha256(b"".join(s.image.tobytes() + s.crop.tobytes() for s in scenes("test", 6)))
    assert digest.hexdigest()[:16] == "2456f640c39e1ab2"


def test_splits_and_rows_are_disjoint() -> None:
    seen = [hashlib.sha256(s.plain.tobytes()).digest() for split in world.SPLITS for s in scenes(split, 40)]
    assert len(set(seen)) == len(seen)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(world.SPLITS), st.integers(0, 10**6))
def test_crop_is_the_enlarged_region_of_the_unboxed_scene(split: str, index: int) -> None:
    s = world.scene(0, split, index)
    x0, y0, x1, y1 = s.box
    assert 1 <= x0 < x1 <= world.SIDE - 1 and 1 <= y0 < y1 <= world.SIDE - 1
    assert np.array_equal(s.crop, world.enlarge(s.plain[y0:y1, x0:x1]))
    assert np.array_equal(s.image[y0:y1, x0:x1], s.plain[y0:y1, x0:x1])
    frame = np.argwhere((s.image != s.plain).any(-1))
    assert frame.min(0).tolist() == [y0 - 1, x0 - 1] and frame.max(0).tolist() == [y1, x1]
    assert (x1 - x0) * (y1 - y0) / world.SIDE**2 < 0.1
    assert s.crop.shape[0] % 16 == 0 and s.image.shape == (world.SIDE, world.SIDE, 3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_only_the_target_has_its_middle_in_the_box(index: int) -> None:
    s = world.scene(0, "train", index)
    x0, y0, x1, y1 = s.box
    inside = [t for t in s.things if x0 <= t[0] < x1 and y0 <= t[1] < y1]
    assert inside == [s.things[-1]] and s.things[-1][2:] == (s.facts.name, s.facts.colour)


@pytest.mark.parametrize("split", ["train", "test", "holdout"])
def test_right_letters_are_balanced_within_each_family(split: str) -> None:
    rows = scenes(split, 120)
    for family in {s.family for s in rows}:
        counts = Counter(s.answer for s in rows if s.family == family)
        assert max(counts.values()) - min(counts.values()) <= 1
    for s in rows:
        assert s.options["ABCD".index(s.answer)] == s.asked and len(set(s.options)) == 4


def test_options_are_mostly_present_elsewhere() -> None:
    """Otherwise "which option stands in the scene at all?" would answer the question without the box."""
    rows = [s for s in scenes("train", 90) if s.family == "digit"]
    wrong = [o in {t[2] for t in s.things[:-1]} for s in rows for o in s.options if o != s.asked]
    assert np.mean(wrong) > 0.9


def test_the_holdout_family_is_never_asked_about_in_training() -> None:
    asked = {s.family for split in ("train", "validation", "test") for s in scenes(split, 30)}
    assert asked == set(world.FAMILIES) and world.HOLDOUT_FAMILY not in asked


def test_responses_name_the_asked_thing_before_the_letter_and_vary() -> None:
    rng = np.random.default_rng(0)
    rows = scenes("train", 60)
    texts = [scene_response(s, rng) for s in rows]
    for s, text in zip(rows, texts, strict=True):
        evidence, letter = text.split(" Answer: ")
        assert s.asked in evidence and letter == s.answer
    same = {scene_response(rows[0], rng) for _ in range(30)}
    assert len(same) > 15
