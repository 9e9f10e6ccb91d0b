"""The triplet schema: round trip, and one sentence for every kind of broken row."""

import io
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import schema, validate
from data.miniature import prepare, world
from vopd.backbone.dataset import TripletDataset
from vopd.backbone.rollout import decode
from vopd.common import images as pictures
from vopd.errors import UserError


@pytest.fixture
def good() -> list[dict]:
    return list(prepare.rows("train", 5, seed=0))


def test_round_trip(good: list[dict], tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    assert schema.write(iter(good), path, batch=2) == 5
    read = schema.read(path)
    assert read.column_names == list(schema.COLUMNS) and len(read) == 5
    for i, row in enumerate(read):
        s = world.scene(0, "train", i)
        assert np.array_equal(np.asarray(row["image"]), s.image)
        assert np.array_equal(np.asarray(row["crop"]), s.crop)
        assert tuple(row["box"]) == s.box and row["question"] == s.question and row["answer"] == s.answer
        assert row["hint"] in row["question"] and row["split"] == "train"


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("image", {"bytes": b"not an image", "path": None}),
        ("crop", None),
        ("box", [5, 5, 5, 9]),
        ("box", [0, 0, 129, 9]),
        ("question", " "),
        ("hint", "never said"),
        ("answer", "E"),
        ("original", {"bytes": b"not an image", "path": None}),
        ("image", {"bytes": None, "path": "/etc/hostname"}),
        ("image", {"bytes": None, "path": "images/../../x.png"}),
        ("image", {"bytes": None, "path": "images/absent.png"}),
        ("crop", {"bytes": None, "path": None}),
    ],
)
def test_a_broken_row_is_named(good: list[dict], tmp_path: Path, column: str, value: object) -> None:
    good[3][column] = value
    with pytest.raises(UserError, match=rf"rows\.parquet: row 3, column '{column}'"):
        schema.write(good, tmp_path / "rows.parquet", batch=2)
    assert not (tmp_path / "rows.parquet").exists()


def test_files_that_are_no_data_sets(good: list[dict], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        schema.read(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(UserError, match="not a parquet file"):
        schema.read(tmp_path / "text.parquet")
    schema.write([], tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="holds no rows"):
        schema.read(tmp_path / "empty.parquet")
    schema.write(good, tmp_path / "rows.parquet")
    pq.write_table(pq.read_table(tmp_path / "rows.parquet").drop_columns("crop"), tmp_path / "less.parquet")
    with pytest.raises(UserError, match="no column 'crop'"):
        schema.read(tmp_path / "less.parquet")


def test_a_file_written_elsewhere_is_checked_when_read(good: list[dict], tmp_path: Path) -> None:
    good[1]["crop"] = {"bytes": b"GIF89a broken", "path": None}
    table = pa.Table.from_pylist(good, schema=schema.FEATURES.arrow_schema)
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="row 1, column 'crop'"):
        schema.read(tmp_path / "rows.parquet")


def test_encode_keeps_pixels() -> None:
    pixels = (np.arange(48 * 32 * 3) % 251).astype(np.uint8).reshape(32, 48, 3)
    with Image.open(io.BytesIO(schema.encode(Image.fromarray(pixels))["bytes"])) as picture:
        assert picture.format == "PNG" and np.array_equal(np.asarray(picture), pixels)


def with_paths(rows: list[dict], folder: Path) -> list[dict]:
    """The rows with images in files below `folder`."""
    (folder / "images").mkdir(parents=True)
    for row in rows:
        for column in schema.IMAGES:
            name = f"images/{row['id']}-{column}.png"
            (folder / name).write_bytes(row[column]["bytes"])
            row[column] = {"bytes": None, "path": name}
    return rows


@pytest.mark.parametrize("paths", [False, True])
def test_a_moved_folder_still_reads(good: list[dict], tmp_path: Path, paths: bool) -> None:
    rows = with_paths(good, tmp_path / "first") if paths else good
    schema.write_shards(rows, tmp_path / "first" / "train.parquet", rows_per_shard=2)
    before = schema.split_hash(tmp_path / "first" / "train.parquet")
    (tmp_path / "first").rename(tmp_path / "second")
    moved = tmp_path / "second" / "train.parquet"
    assert schema.split_hash(moved) == before
    pictures = [np.asarray(row["image"]) for row in schema.read(moved)]
    assert all(np.array_equal(p, world.scene(0, "train", i).image) for i, p in enumerate(pictures))
    trained_on = TripletDataset(str(moved), None, None)
    for i in range(5):
        row = decode(trained_on[i]["row"])
        assert np.array_equal(np.asarray(row["crop"]), world.scene(0, "train", i).crop)
        assert "original" not in row


def test_datasets_reads_what_we_write(good: list[dict], tmp_path: Path) -> None:
    schema.write_shards(good, tmp_path / "train.parquet", rows_per_shard=2)
    files = [str(file) for file in schema.shards(tmp_path / "train.parquet")]
    data = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert data.features == schema.FEATURES
    assert np.array_equal(np.asarray(data[4]["image"]), world.scene(0, "train", 4).image)


def test_we_read_what_datasets_writes(good: list[dict], tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_list(good, features=schema.FEATURES).to_parquet(str(path))
    assert list(schema.rows(path)) == good
    assert np.array_equal(np.asarray(schema.read(path)[4]["crop"]), world.scene(0, "train", 4).crop)


def test_the_hash_follows_rows_and_the_images_they_name(good: list[dict], tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    schema.write(with_paths(good, tmp_path), path)
    hashes = [schema.split_hash(path)]
    with (tmp_path / good[4]["crop"]["path"]).open("ab") as file:
        file.write(b"x")
    hashes.append(schema.split_hash(path))
    schema.write(good[:4], path)
    hashes.append(schema.split_hash(path))
    assert len(set(hashes)) == 3


def test_a_link_out_of_the_folder_is_refused(good: list[dict], tmp_path: Path) -> None:
    (tmp_path / "outside.png").write_bytes(good[0]["image"]["bytes"])
    inside = tmp_path / "set"
    inside.mkdir()
    (inside / "image.png").symlink_to(tmp_path / "outside.png")
    good[0]["image"] = {"bytes": None, "path": "image.png"}
    with pytest.raises(UserError, match="leads out of the data folder"):
        schema.write(good, inside / "train.parquet")


@pytest.mark.parametrize(("rows_per_shard", "sizes"), [(2, [2, 2, 1]), (5, [5]), (9, [5]), (1, [1] * 5)])
def test_shards(good: list[dict], tmp_path: Path, rows_per_shard: int, sizes: list[int]) -> None:
    path = tmp_path / "train.parquet"
    schema.write(good, path)
    assert schema.write_shards(iter(good), path, rows_per_shard) == 5
    files = schema.shards(path)
    assert [f.name for f in files] == [
        f"train-{i:05d}-of-{len(sizes):05d}.parquet" for i in range(len(sizes))
    ]
    assert [pq.read_metadata(f).num_rows for f in files] == sizes
    assert sorted(tmp_path.iterdir()) == files
    assert [row["id"] for row in schema.rows(path)] == [row["id"] for row in good]
    assert schema.count_rows(path) == 5 and schema.splits(tmp_path) == [path]


def test_incomplete_and_doubled_shards_are_refused(good: list[dict], tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    schema.write_shards(good, path, rows_per_shard=2)
    schema.write(good, tmp_path / "train-extra.parquet")
    assert len(schema.shards(path)) == 3
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(UserError, match="not 3 files"):
        schema.shards(path)
    schema.write(good, path)
    with pytest.raises(UserError, match="shards of it as well"):
        schema.shards(path)


def test_a_row_of_a_later_shard_is_named_by_its_number_in_the_split(good: list[dict], tmp_path: Path) -> None:
    good[4]["answer"] = "E"
    with pytest.raises(UserError, match=r"train\.parquet: row 4"):
        schema.write_shards(good, tmp_path / "train.parquet", rows_per_shard=2)
    assert not list(tmp_path.glob("*.parquet"))


def test_large_rows_are_written_in_small_groups(good: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "BATCH_BYTES", 2 * len(good[0]["image"]["bytes"]))
    assert max(len(group) for group in schema.batched_rows(good, 256)) <= 2


def test_bombs_and_other_formats_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = schema.encode(Image.new("RGB", (50, 40)))
    assert schema.open_image(cell, tmp_path).size == (50, 40)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1999)
    with pytest.raises(UserError, match="50 x 40 pixels"):
        schema.open_image(cell, tmp_path)
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40)).save(buffer, "TIFF")
    with pytest.raises(UserError, match="not a readable image"):
        schema.open_image({"bytes": buffer.getvalue(), "path": None}, tmp_path)


def _file_of(format_: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(world.scene(0, "train", 0).crop).save(buffer, format_)
    return buffer.getvalue()


WHOLE = {format_: _file_of(format_) for format_ in schema.FORMATS}


@given(
    st.sampled_from(schema.FORMATS),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=6),
    st.floats(0, 1),
)
@settings(max_examples=300)
def test_a_spoiled_file_decodes_or_is_refused(format_: str, changes: list, keep: float) -> None:
    content = bytearray(WHOLE[format_])
    for place, value in changes:
        content[place % len(content)] = value
    cell = {"bytes": bytes(content[: round(max(keep, 0.01) * len(content))]), "path": None}
    with suppress(UserError):
        schema.decode_image(cell, Path()).getpixel((0, 0))


def stored_sideways(cell: dict, orientation: int, format_: str) -> dict:
    """A cell that shows the same pixels, stored rotated by 90 degrees, with the matching EXIF orientation."""
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture = Image.open(io.BytesIO(cell["bytes"])).transpose(back)
    picture.save(buffer, format_, exif=exif, **({"lossless": True} if format_ == "WEBP" else {}))
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.parametrize(("orientation", "format_"), [(6, "PNG"), (8, "PNG"), (6, "WEBP")])
def test_boxes_sizes_and_crops_are_those_of_the_picture_as_shown(
    good: list[dict], tmp_path: Path, orientation: int, format_: str
) -> None:
    for row in good:  # a strip wider than high, whose box lies outside of it before it is turned
        x0, y0, x1, y1 = row["box"]
        picture = Image.open(io.BytesIO(row["image"]["bytes"]))
        top = min(max(0, (y0 + y1) // 2 - 32), 64)
        row["image"] = schema.encode(picture.crop((0, top, 128, top + 64)).resize((256, 128)))
        row["box"] = [2 * x0, 2 * (y0 - top), 2 * x1, 2 * (y1 - top)]
        row["crop"] = schema.encode(picture.crop((x0, y0, x1, y1)).resize((96, 64)))
        for column in schema.IMAGES:
            row[column] = stored_sideways(row[column], orientation, format_)
    assert any(row["box"][2] > 128 for row in good)
    schema.write(good, tmp_path / "train.parquet")
    assert validate.validate([tmp_path / "train.parquet"]).blocking == []
    row = next(schema.rows(tmp_path / "train.parquet"))
    outlined = schema.outline(row, tmp_path)
    assert (outlined["image"].size, outlined["crop"].size) == ((256, 128), (96, 64))
    assert schema.decode_image(row["image"], tmp_path).size == (256, 128)
    good[2]["box"] = [10, 130, 40, 160]  # inside the stored file's 128 x 256
    with pytest.raises(UserError, match=r"row 2, column 'box': .* inside the 256 x 128 image"):
        schema.write(good, tmp_path / "bad.parquet")
