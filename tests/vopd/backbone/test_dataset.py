"""Triplets as verl reads them: rows unchanged, images still encoded."""

import io
from pathlib import Path

import datasets
import pytest
from PIL import Image

from vopd.backbone.dataset import TripletDataset


@pytest.fixture
def file(tmp_path: Path) -> str:
    rows = {
        "id": [f"r{i}" for i in range(5)],
        "image": [Image.new("RGB", (8 + i, 6), (i, 0, 0)) for i in range(5)],
        "crop": [Image.new("RGB", (4, 4)) for _ in range(5)],
        "question": ["q"] * 5,
    }
    features = datasets.Features(
        id=datasets.Value("string"),
        image=datasets.Image(),
        crop=datasets.Image(),
        question=datasets.Value("string"),
    )
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return str(path)


def test_a_row_arrives_as_it_was_written(file: str) -> None:
    item = TripletDataset(file, None, None)[3]
    assert (item["index"], item["row"]["id"], item["row"]["question"]) == (3, "r3", "q")
    encoded = item["row"]["image"]["bytes"]
    assert isinstance(encoded, bytes)
    assert Image.open(io.BytesIO(encoded)).size == (11, 6)


@pytest.mark.parametrize(("wanted", "length"), [(-1, 5), (0, 5), (2, 2), (9, 5)])
def test_max_samples_bounds_the_rows(file: str, wanted: int, length: int) -> None:
    assert len(TripletDataset([file], None, None, max_samples=wanted)) == length


def test_several_files_follow_one_another(file: str) -> None:
    data = TripletDataset([file, file], None, None)
    assert [data[i]["row"]["id"] for i in (4, 5)] == ["r4", "r0"]
