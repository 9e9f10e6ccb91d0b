"""Overlays: the answer is found again in the pixels alone. Rendered text: bounded, nothing hidden, rows stay valid."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from skimage.data import astronaut

from data import audit, schema, transforms, validate
from data.miniature import prepare
from vopd.errors import UserError

GREY = (128, 128, 128)
WINDOWS = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(24, 160), st.integers(24, 160))


def parts(picture: Image.Image, colour: str) -> list[tuple[float, float]]:
    """Middles (x, y) of the connected parts of exactly one colour."""
    mask = (np.asarray(picture) == transforms.COLOURS[colour]).all(-1)
    labelled, count = ndimage.label(mask)
    return [(x, y) for y, x in ndimage.center_of_mass(mask, labelled, range(1, count + 1))]


def drawn(name: str, window: tuple[int, int, int, int], seed: int) -> tuple[Image.Image, transforms.Task]:
    x, y, width, height = window
    box = (x, y, x + width, y + height)
    plain = Image.new("RGB", (220, 210), GREY)
    picture, task = transforms.overlay(plain, box, np.random.default_rng(seed), name)
    changed = (np.asarray(picture) != np.asarray(plain)).any(-1)
    ys, xs = np.nonzero(changed)
    assert x <= xs.min() and xs.max() < x + width and y <= ys.min() and ys.max() < y + height
    return picture, task


def words(task: transforms.Task) -> Iterator[str]:
    """Colours in the order of the question."""
    return (word for word in task.question.split() if word in transforms.COLOURS)


def right(task: transforms.Task) -> str:
    assert len(set(task.options)) == len(task.options) == 4
    return task.options["ABCD".index(task.answer)]


@given(window=WINDOWS, seed=st.integers(0, 10**6))
def test_box_relation_is_in_the_pixels(window: tuple[int, int, int, int], seed: int) -> None:
    picture, task = drawn("box relation", window, seed)
    [one], [two] = (parts(picture, colour) for colour in words(task))
    dx, dy = one[0] - two[0], one[1] - two[1]
    assert abs(abs(dx) - abs(dy)) > 1
    if abs(dx) > abs(dy):
        assert right(task) == ("left of" if dx < 0 else "right of")
    else:
        assert right(task) == ("above" if dy < 0 else "below")


@given(window=WINDOWS, seed=st.integers(0, 10**6))
def test_circle_count_is_in_the_pixels(window: tuple[int, int, int, int], seed: int) -> None:
    picture, task = drawn("circle counting", window, seed)
    [asked] = words(task)
    assert right(task) == str(len(parts(picture, asked)))
    assert {shape.colour for shape in task.shapes} >= {asked}


@given(window=WINDOWS, seed=st.integers(0, 10**6))
def test_nearest_point_is_in_the_pixels(window: tuple[int, int, int, int], seed: int) -> None:
    picture, task = drawn("point distance", window, seed)
    [reference_colour] = words(task)
    [reference] = parts(picture, reference_colour)
    [point_colour] = {shape.colour for shape in task.shapes} - {reference_colour}
    points = parts(picture, point_colour)
    assert len(points) == 4  # no label covers a point
    distances = sorted((np.hypot(x - reference[0], y - reference[1]), x, y) for x, y in points)
    assert distances[1][0] >= 1.2 * distances[0][0]
    # The label at the nearest point's lower right is the one of the right number.
    _, x, y = distances[0]
    shape = next(s for s in task.shapes if s.label == right(task))
    assert ((shape.extent[0] + shape.extent[2]) / 2, (shape.extent[1] + shape.extent[3]) / 2) == (x, y)
    white = (np.asarray(picture) == transforms.LABEL_COLOUR).all(-1)
    reach = 5 * (shape.extent[2] - shape.extent[0] + 1) + 7
    assert white[int(y) : int(y) + reach, int(x) : int(x) + reach].any()


@given(seed=st.integers(0, 10**6))
def test_labels_are_four_different_signs(seed: int) -> None:
    _, task = drawn("point distance", (0, 0, 120, 120), seed)
    assert [s.label for s in task.shapes] == ["", "1", "2", "3", "4"]


def test_right_letters_and_answers_are_balanced() -> None:
    tasks = [drawn(name, (0, 0, 60, 60), seed)[1] for name in transforms.TASKS for seed in range(200)]
    letters = np.unique([task.answer for task in tasks], return_counts=True)[1]
    assert len(letters) == 4 and letters.min() > 0.2 * len(tasks)
    for name, values in (("box relation", 4), ("circle counting", 8), ("point distance", 4)):
        counts = np.unique([right(t) for t in tasks if t.name == name], return_counts=True)[1]
        assert len(counts) == values and counts.min() > 0.4 * 200 / values


def test_a_seed_draws_the_same_task_again_and_leaves_the_picture_alone() -> None:
    picture = Image.fromarray(astronaut())
    before = picture.tobytes()
    first, second, other = (
        transforms.overlay(picture, (9, 9, 99, 99), np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    assert first[0].tobytes() == second[0].tobytes() and first[1] == second[1] and first[1] != other[1]
    assert picture.tobytes() == before


def test_too_small_a_window_is_a_sentence() -> None:
    with pytest.raises(UserError, match="23 pixels"):
        transforms.overlay(Image.new("RGB", (99, 99)), (0, 0, 23, 60), np.random.default_rng(0))


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return list(prepare.rows("train", 12, 0))


@pytest.mark.parametrize("name", transforms.TASKS)
def test_miniature_rows_with_an_overlay_are_valid(rows: list[dict], tmp_path: Path, name: str) -> None:
    changed = [transforms.overlay_row(row, np.random.default_rng(n), name=name) for n, row in enumerate(rows)]
    path = tmp_path / "rows.parquet"
    assert schema.write(changed, path) == len(rows)
    for row, before in zip(schema.read(path), rows, strict=True):
        x0, y0, x1, y1 = row["box"]
        assert (row["id"], row["box"], row["hint"]) == (before["id"], before["box"], before["hint"])
        assert row["family"] == f"overlay: {name}" and row["question"].endswith(row["hint"])
        window = row["image"].crop((x0, y0, x1, y1))
        expected = np.asarray(window.resize(row["crop"].size, Image.Resampling.LANCZOS))
        assert np.array_equal(expected, np.asarray(row["crop"]))
        outside = np.ones((128, 128), bool)
        outside[y0:y1, x0:x1] = False
        was = np.asarray(transforms.picture_of(before["image"], tmp_path))
        assert np.array_equal(np.asarray(row["image"])[outside], was[outside])
        if name == "circle counting":
            colour = row["question"].split()[2]
            assert row["options"]["ABCD".index(row["answer"])] == str(len(parts(window, colour)))


def test_an_overlay_takes_the_crop_from_the_unboxed_original(rows: list[dict], tmp_path: Path) -> None:
    plain = Image.new("RGB", (128, 128), GREY)
    (tmp_path / "plain.png").write_bytes(schema.encode(plain)["bytes"])
    row = {**rows[0], "original": {"bytes": None, "path": "plain.png"}}
    changed = transforms.overlay_row(row, np.random.default_rng(0), tmp_path, "circle counting")
    original = transforms.picture_of(changed["original"], tmp_path)
    crop = original.crop(row["box"]).resize((48, 48), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(crop), np.asarray(transforms.picture_of(changed["crop"], tmp_path)))
    assert original.tobytes() != plain.tobytes()


def test_rendered_text_leaves_the_question_and_stands_under_both_pictures(
    rows: list[dict], tmp_path: Path
) -> None:
    changed = [transforms.render_row(row, np.random.default_rng(n)) for n, row in enumerate(rows)]
    path = tmp_path / "rows.parquet"
    schema.write(changed, path)
    for row, before in zip(schema.read(path), rows, strict=True):
        head, tail = row["question"].split(transforms.POINTER)
        assert before["question"].startswith(head) and before["question"].endswith(tail.lstrip(" "))
        gone = before["question"][len(head) : len(before["question"]) - len(tail)].split()
        assert len(gone) >= 1 and all(f"{letter}) " in tail for letter in "ABCD") and row["hint"] in tail
        for column, most in (("image", 1.25), ("crop", 2)):
            was = transforms.picture_of(before[column], tmp_path)
            now = row[column]
            assert now.width == was.width and was.height < now.height <= most * was.height
            assert now.crop((0, 0, was.width, was.height)).tobytes() == was.tobytes()
            strip = now.crop((0, was.height, now.width, now.height))
            expected = transforms.strip(" ".join(gone), was.size, most - 1)
            assert expected is not None and strip.tobytes() == expected.tobytes()
        assert (row["answer"], row["options"], row["box"]) == (
            before["answer"],
            before["options"],
            before["box"],
        )


@pytest.mark.parametrize(("family", "refused"), [(None, 0), ("digit", 2)])
def test_a_crop_with_rendered_text_is_not_held_against_its_box(
    rows: list[dict], tmp_path: Path, family: str | None, refused: int
) -> None:
    changed = [transforms.render_row(row, np.random.default_rng(0)) for row in rows[:2]]
    path = tmp_path / f"{changed[0]['split']}.parquet"
    schema.write([{**row, "family": family or row["family"]} for row in changed], path)
    assert [f.kind for f in validate.validate([path]).blocking] == ["crop"] * refused


@given(
    text=st.text(st.characters(codec="ascii", exclude_categories=["C"]), min_size=1, max_size=300).filter(
        str.strip
    ),
    width=st.integers(8, 900),
    height=st.integers(8, 900),
)
def test_a_strip_is_bounded_and_nothing_is_cut_off(text: str, width: int, height: int) -> None:
    strip = transforms.strip(text, (width, height), 0.25)
    if strip is not None:
        assert strip.width == width and strip.height <= height * 0.25
        assert (np.asarray(strip) < 128).any()


def test_a_longer_text_needs_a_higher_strip_until_there_is_no_room() -> None:
    heights = [transforms.strip("several words " * n, (300, 400), 0.25) for n in (1, 6, 60)]
    assert heights[0] is not None and heights[1] is not None and heights[2] is None
    assert heights[0].height < heights[1].height


def test_rendered_text_stands_under_the_original_too(rows: list[dict], tmp_path: Path) -> None:
    row = {**rows[0], "original": schema.encode(Image.new("RGB", (128, 128), GREY))}
    changed = transforms.render_row(row, np.random.default_rng(0))
    image, original = (transforms.picture_of(changed[c], tmp_path) for c in ("image", "original"))
    under = (0, 128, 128, image.height)
    assert image.size == original.size and image.crop(under).tobytes() == original.crop(under).tobytes()


def test_a_question_too_short_or_a_crop_too_small_stays(rows: list[dict]) -> None:
    short = {**rows[0], "question": f"What?\nA) x\n{rows[0]['hint']}"}
    assert transforms.render_row(short, np.random.default_rng(0)) == short
    tiny = {**rows[0], "crop": schema.encode(Image.new("RGB", (9, 9)))}
    assert transforms.render_row(tiny, np.random.default_rng(0)) == tiny


def test_an_overlay_on_a_photograph_does_not_hide_that_it_is_a_copy() -> None:
    picture = Image.fromarray(astronaut())
    changed, _ = transforms.overlay(picture, (40, 60, 190, 210), np.random.default_rng(0))
    assert audit.correlation(audit.thumbnail(picture), audit.thumbnail(changed)) > audit.CORRELATION
