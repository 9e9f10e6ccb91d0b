"""What the four numbers of a bbox mean is found by looking, and is an error where it cannot be."""

import io
from types import ModuleType

import pytest
from PIL import Image

from data.vision_opd_6k import boxes
from vopd.errors import UserError

ROWS = 24
SIDE = 512


@pytest.fixture(scope="module")
def rows(layout: ModuleType) -> list[tuple[list[float], Image.Image, Image.Image]]:
    """(corner box in pixels, full image, crop) of published rows."""
    made = []
    for index in range(ROWS):
        row, image, crop = layout.published_row(index)
        made.append((row["bbox"], *(Image.open(io.BytesIO(c)).convert("RGB") for c in (image, crop))))
    return made


WAYS = {
    "x0, y0, x1, y1 in pixels": lambda x0, y0, x1, y1: [x0, y0, x1, y1],
    "x, y, width, height in pixels": lambda x0, y0, x1, y1: [x0, y0, x1 - x0, y1 - y0],
    "x0, y0, x1, y1 as fractions": lambda *b: [edge / SIDE for edge in b],
    "x0, y0, x1, y1 in thousandths": lambda *b: [edge * 1000 / SIDE for edge in b],
    "y0, x0, y1, x1 in thousandths": lambda x0, y0, x1, y1: [e * 1000 / SIDE for e in (y0, x0, y1, x1)],
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_found(rows: list, way: str) -> None:
    reading = boxes.find_reading((WAYS[way](*box), image, crop) for box, image, crop in rows)
    assert (reading.name, reading.growth) == (way, 1)
    for box, image, _ in rows:
        found = reading.box(WAYS[way](*box), *image.size)
        assert max(abs(a - b) for a, b in zip(found, box, strict=True)) <= 1


@pytest.mark.parametrize(("drawn", "growth"), [(1.1, 1 / 1.1), (1.05, 1 / 1.05), (1 / 1.1, 1.1)])
def test_a_bbox_wider_or_narrower_than_the_crop_is_found(rows: list, drawn: float, growth: float) -> None:
    def widened(box: list[float]) -> list[float]:
        more = (box[2] - box[0]) * (drawn - 1) / 2
        return [box[0] - more, box[1] - more, box[2] + more, box[3] + more]

    inside = [row for row in rows if min(row[0]) > 8 and max(row[0]) < SIDE - 8]
    reading = boxes.find_reading((widened(box), image, crop) for box, image, crop in inside)
    assert (reading.name, reading.growth) == ("x0, y0, x1, y1 in pixels", pytest.approx(growth))
    for box, image, _ in inside:
        assert max(abs(a - b) for a, b in zip(reading.box(widened(box), *image.size), box, strict=True)) <= 1


def test_numbers_that_mean_nothing_are_an_error(rows: list) -> None:
    with pytest.raises(UserError, match="cannot be verified"):
        boxes.find_reading(([7.0, 9.0, 60.0, 70.0], image, crop) for _, image, crop in rows)
    with pytest.raises(UserError, match="Of 0 sampled rows"):
        boxes.find_reading([])


def test_without_a_frame_it_is_not_verified(rows: list, layout: ModuleType) -> None:
    plain = [
        layout.big(layout.world.scene(0, "train", i - 1 if i % 5 == 4 else i).plain) for i in range(ROWS)
    ]
    assert not any(boxes.has_red_frame(p, tuple(r[0])) for p, r in zip(plain, rows, strict=True))
    assert all(boxes.has_red_frame(r[1], tuple(r[0])) for r in rows)
    with pytest.raises(UserError, match="red frame"):
        boxes.find_reading((r[0], p, r[2]) for p, r in zip(plain, rows, strict=True))


def test_a_few_odd_rows_do_not_hide_the_meaning(rows: list) -> None:
    odd = [([1.0, 1.0, 40.0, 40.0], *row[1:]) if i in (3, 11) else row for i, row in enumerate(rows)]
    assert boxes.find_reading(odd).name == "x0, y0, x1, y1 in pixels"


@pytest.mark.parametrize("bbox", [[1, 2, 3, 4], [[1, 2, 3, 4]], "[1, 2, 3, 4]", [1.0, 2.0, 3.0, 4.0]])
def test_numbers(bbox: object) -> None:
    assert boxes.numbers_of(bbox) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "bbox", [None, [1, 2, 3], "x", "{}", {}, [1, 2, 3, "4"], [1, 2, 3, float("nan")], [1, 2, 3, 1e9]]
)
def test_no_numbers(bbox: object) -> None:
    with pytest.raises(ValueError):
        boxes.numbers_of(bbox)
