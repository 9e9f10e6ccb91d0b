"""The crop is found where it was cut, through JPEG and enlargement; shifts, other crops and wider cuts are seen."""

import io

import numpy as np
import pytest
from PIL import Image

from data import crop_match
from data.miniature import world

SCENES = [world.scene(0, split, i) for split in ("train", "test") for i in range(40)]


def jpeg(picture: Image.Image, quality: int, times: int) -> Image.Image:
    size = picture.width * times, picture.height * times
    buffer = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue()))


def share(crops: list[Image.Image], boxes: list[tuple[int, int, int, int]]) -> float:
    """Share of scenes whose crop matches."""
    rows = zip(SCENES, crops, boxes, strict=True)
    return float(
        np.mean([crop_match.match(Image.fromarray(s.image), crop, box).matches for s, crop, box in rows])
    )


CROPS, BOXES = [Image.fromarray(s.crop) for s in SCENES], [s.box for s in SCENES]


def test_every_miniature_row_matches() -> None:
    assert share(CROPS, BOXES) == 1


@pytest.mark.parametrize("quality", [95, 75, 50])
def test_jpeg_crops_enlarged_twice_match(quality: int) -> None:
    assert share([jpeg(crop, quality, 2) for crop in CROPS], BOXES) == 1


def test_a_larger_scene_matches_at_bounded_cost() -> None:
    for scene in SCENES[:8]:
        image = Image.fromarray(scene.image).resize((1280, 1280), Image.Resampling.BICUBIC)
        box = tuple(10 * edge for edge in scene.box)
        assert crop_match.match(jpeg(image, 80, 1), jpeg(Image.fromarray(scene.crop), 80, 2), box).matches


def test_another_rows_crop_does_not() -> None:
    assert share(CROPS[1:] + CROPS[:1], BOXES) < 0.05


@pytest.mark.parametrize("shift", [4, 8, 14])
def test_a_shifted_box_does_not_and_the_offset_is_told(shift: int) -> None:
    away = 0
    for scene in SCENES:
        x0, y0, x1, y1 = scene.box
        sign = -1 if x1 + shift > world.SIDE - 2 else 1
        image, crop = Image.fromarray(scene.image), Image.fromarray(scene.crop)
        match = crop_match.match(image, crop, (x0 + sign * shift, y0, x1 + sign * shift, y1))
        assert not match.matches
        away += match.offset == (-sign * shift, 0)
    assert shift > 6 or away == len(SCENES)  # further off, the frame covers some of the crop's rim


def test_a_box_much_wider_than_the_crop_does_not() -> None:
    wider = [(x0 - 8, y0 - 8, x1 + 8, y1 + 8) for x0, y0, x1, y1 in BOXES]
    inside = [i for i, box in enumerate(wider) if min(box) >= 0 and max(box) <= world.SIDE]
    found = [crop_match.match(Image.fromarray(SCENES[i].image), CROPS[i], wider[i]).matches for i in inside]
    assert len(found) > 10 and not any(found)


@pytest.mark.parametrize(("shown", "matches"), [((90, 120, 90), True), ((200, 120, 90), False)])
def test_a_crop_of_one_colour_is_compared_by_colour(shown: tuple[int, int, int], matches: bool) -> None:
    image = Image.new("RGB", (200, 150), (90, 120, 90))
    assert crop_match.match(image, Image.new("RGB", (60, 60), shown), (50, 50, 80, 80)).matches is matches


def test_tiny_boxes_and_boxes_at_the_edge() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for box in [(0, 0, 12, 12), (70, 50, 80, 60), (0, 0, 80, 5), (3, 3, 4, 4), (0, 0, 80, 60)]:
        crop = image.crop(box)
        assert crop_match.match(
            image, crop.resize((2 * crop.width, 2 * crop.height), Image.Resampling.NEAREST), box
        ).matches
