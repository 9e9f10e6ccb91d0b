"""The triplet schema: round trip, and one sentence for every kind of broken row."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import schema
from data.miniature import prepare, world
from vopd.errors import UserError


@pytest.fixture
def good() -> list[dict]:
    return list(prepare.rows("train", 5, seed=0))


def test_round_trip(good: list[dict], tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    assert schema.write(iter(good), path, batch=2) == 5
    read = schema.read(path)
    assert read.features == schema.FEATURES and len(read) == 5
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
        ("question", "<image> What?"),
        ("hint", "never said"),
        ("answer", "E"),
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
