"""What a bbox means is stated: rows that show it pass, and twins that do not are told from them by what is wrong."""

from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data import crop_match
from data.vision_opd_6k import boxes

pytestmark = pytest.mark.slow

SCALES = {"small": (0.2, 40), "real": (1, 6)}
Row = tuple[list[int], Image.Image, Image.Image]


@pytest.fixture(scope="module", params=SCALES)
def rows(layout: ModuleType, request: pytest.FixtureRequest) -> list[Row]:
    """(bbox, full image, crop) of published rows; of real size, the geometries at the edges."""
    scale, count = SCALES[request.param]
    made = (layout.published_row(index, scale) for index in range(count) if index % 5 != 4)
    return [(row["bbox"], pictures["images"], pictures["teacher_images"]) for row, pictures in made]


def wrong(bbox: list[int], image: Image.Image, crop: Image.Image) -> str | None:
    """As a row is held to its box by preparation: meaning and frames, then content."""
    try:
        box = boxes.box_of(bbox, *image.size)
    except ValueError as error:
        return str(error)
    found = crop_match.match_box(image, crop, box)
    return boxes.problem(image, crop, box) or (None if found.matches else "another content")


def test_every_row_passes(rows: list[Row]) -> None:
    assert [wrong(*row) for row in rows] == [None] * len(rows)


@pytest.mark.parametrize("direction", [(1, 0), (0, 1), (-1, 0), (0, -1)])
def test_a_shifted_box_does_not(rows: list[Row], direction: tuple[int, int]) -> None:
    for bbox, image, crop in rows:
        steps = [max(6, (high - low) // 3) for low, high in zip(bbox, bbox[2:], strict=False)]
        moved = [edge + direction[i % 2] * steps[i % 2] for i, edge in enumerate(bbox)]
        assert wrong(moved, image, crop)


def test_the_crop_of_another_row_does_not_even_in_its_size(rows: list[Row]) -> None:
    for (bbox, image, crop), other in zip(rows, rows[1:] + rows[:1], strict=True):
        assert wrong(bbox, image, other[2])
        assert wrong(bbox, image, other[2].resize(crop.size))


def test_a_missing_frame_is_named(layout: ModuleType) -> None:
    for index in range(8):
        for frames, why in (
            ((False, True), "around bbox in the image"),
            ((True, False), "frame in the crop"),
        ):
            row, pictures = layout.published_row(index, frames=frames)
            assert why in str(wrong(row["bbox"], pictures["images"], pictures["teacher_images"]))


def test_other_meanings_of_the_numbers_do_not_pass(rows: list[Row]) -> None:
    ways = (
        lambda b, w, h: [b[0], b[1], b[2] - b[0], b[3] - b[1]],
        lambda b, w, h: [b[0] * 1000 // w, b[1] * 1000 // h, b[2] * 1000 // w, b[3] * 1000 // h],
        lambda b, w, h: [b[1], b[0], b[3], b[2]],
        lambda b, w, h: list(crop_match.widened(tuple(b), (w, h))),
    )
    for way in ways:
        assert all(wrong(way(bbox, *image.size), image, crop) for bbox, image, crop in rows)


def test_a_crop_that_was_not_enlarged_twice_is_named(rows: list[Row]) -> None:
    bbox, image, crop = rows[0]
    once = crop.resize((crop.width // 2, crop.height // 2))
    assert f"the crop has {once.width} x {once.height} pixels; bbox, widened" in str(wrong(bbox, image, once))


@pytest.mark.parametrize("bbox", [[10, 20, 30, 40], [10.0, 20.0, 30.0, 40.0]])
def test_four_whole_numbers(bbox: object) -> None:
    assert boxes.box_of(bbox, 30, 40) == (10, 20, 30, 40)


@pytest.mark.parametrize(
    "bbox",
    [None, [1, 2, 3], "[1, 2, 3, 4]", {}, [[1, 2, 3, 4]], [1, 2, 3, "4"], [1, 2, 3, float("nan")],
     [1, 2, 3, float("inf")], [0.1, 0.1, 0.5, 0.5], [True, 2, 3, 4], [3, 2, 1, 4], [-1, 2, 3, 4],
     [1, 2, 31, 4], [1, 2, 3, 41], [1, 2, 1, 4], [1, 2, 3, 1e300]],
)  # fmt: skip
def test_no_box(bbox: object) -> None:
    with pytest.raises(ValueError, match="bbox"):
        boxes.box_of(bbox, 30, 40)


@pytest.mark.parametrize(
    ("box", "size", "region"),
    [
        ((100, 40, 142, 170), (300, 240), (96, 26, 146, 183)),
        ((3, 71, 98, 126), (300, 240), (0, 65, 108, 132)),
        ((200, 300, 1200, 400), (1600, 700), (95, 289, 1305, 410)),
        ((100, 100, 111, 151), (300, 240), (99, 95, 112, 156)),
    ],
)
def test_the_regions_that_public_code_states_are_met_to_a_pixel(
    box: boxes.Box, size: tuple[int, int], region: boxes.Box
) -> None:
    """Boxes and windows in the tests of a public fork that rebuilds the crops exactly, read second hand."""
    wider = crop_match.widened(box, size)
    assert max(abs(a - b) for a, b in zip(wider, region, strict=True)) <= 1


@given(
    st.tuples(st.integers(16, 6000), st.integers(16, 6000)),
    st.lists(st.floats(0, 1), min_size=4, max_size=4, unique=True),
)
def test_the_widened_box_holds_the_box_and_stays_inside(size: tuple[int, int], edges: list[float]) -> None:
    (x0, x1), (y0, y1) = sorted(edges[:2]), sorted(edges[2:])
    box = (int(x0 * size[0]), int(y0 * size[1]), int(x1 * size[0]), int(y1 * size[1]))
    wider = crop_match.widened(box, size)
    assert 0 <= wider[0] <= box[0] and 0 <= wider[1] <= box[1]
    assert box[2] <= wider[2] <= size[0] and box[3] <= wider[3] <= size[1]
    for low, high in ((0, 2), (1, 3)):
        if wider[low] > 0 and wider[high] < size[low]:
            assert abs(wider[high] - wider[low] - 1.21 * (box[high] - box[low])) <= 1
