"""The triplet row (full image, crop, question) as parquet: columns, check, reader and streaming writer.

Every data set of the project -- the generated miniature, prepared or synthesised sets -- is a file of these
rows.
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypedDict

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from vopd.errors import UserError

FEATURES = Features(
    {
        "id": Value("string"),
        "image": Image(),
        "crop": Image(),
        "box": List(Value("int32"), length=4),
        "question": Value("string"),
        "hint": Value("string"),
        "options": List(Value("string")),
        "answer": Value("string"),
        "answer_type": Value("string"),
        "family": Value("string"),
        "source": Value("string"),
        "licence": Value("string"),
        "split": Value("string"),
    }
)
COLUMNS = tuple(FEATURES)
IMAGES = ("image", "crop")


class Triplet(TypedDict):
    """One row. Images are encoded files (`{"bytes": ..., "path": None}`) in a file and PIL images when read.

    box: x0, y0, x1, y1 in pixels of `image`, right and bottom exclusive. question: the whole text shown to
    the model. hint: the part of it that says where to look, possibly empty. answer: for type `letter`, A,
    B, C ...
    """

    id: str
    image: object
    crop: object
    box: list[int]
    question: str
    hint: str
    options: list[str]
    answer: str
    answer_type: str
    family: str
    source: str
    licence: str
    split: str


def encode(picture: PILImage.Image) -> dict[str, object]:
    """A PIL image as the PNG bytes a row carries."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=3)
    return {"bytes": buffer.getvalue(), "path": None}


def check(row: dict, file: Path, number: int) -> None:
    """Raises `UserError` naming file, row and column if an encoded row breaks the schema."""

    def wrong(column: str, what: str) -> UserError:
        return UserError(f"{file}: row {number}, column {column!r}: {what}.")

    for column in COLUMNS:
        if row.get(column) is None:
            raise wrong(column, "is missing; every row needs all columns of data/schema.py")
    sizes = {}
    for column in IMAGES:
        try:
            with PILImage.open(io.BytesIO(row[column]["bytes"])) as picture:
                picture.verify()
                sizes[column] = picture.size
        except (UnidentifiedImageError, OSError, SyntaxError, TypeError, KeyError) as error:
            raise wrong(column, "is not a readable image; store the bytes of a PNG or JPEG file") from error
    width, height = sizes["image"]
    box = row["box"]
    if len(box) != 4 or not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
        raise wrong("box", f"{box} is not x0, y0, x1, y1 inside the {width} x {height} image")
    if not row["question"].strip() or "<image>" in row["question"]:
        raise wrong("question", "must be text without an <image> marker; the view adds the image")
    if row["hint"] not in row["question"]:
        raise wrong("hint", "must be a part of the question, or empty")
    letters = [chr(ord("A") + i) for i in range(len(row["options"]))]
    if row["answer_type"] == "letter" and row["answer"] not in letters:
        raise wrong("answer", f"{row['answer']!r} is not the letter of one of the {len(letters)} options")


def write(rows: Iterable[dict], path: Path, batch: int = 256) -> int:
    """Streams encoded rows to a parquet file, `batch` rows in memory at a time; returns their number.

    The file appears under its name only when it is complete.
    """
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with pq.ParquetWriter(partial, FEATURES.arrow_schema, compression="zstd") as writer:
        for group in batched_rows(rows, batch):
            for offset, row in enumerate(group):
                check(row, path, count + offset)
            writer.write_table(pa.Table.from_pylist(group, schema=FEATURES.arrow_schema))
            count += len(group)
    partial.replace(path)
    return count


def batched_rows(rows: Iterable[dict], size: int) -> Iterator[list[dict]]:
    """Lists of up to `size` rows."""
    group: list[dict] = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def validate(path: Path) -> int:
    """Checks columns and every row of a file without holding it in memory; returns the number of rows."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; prepare the data set first.")
    try:
        source = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a parquet file; prepare the data set again.") from error
    missing = [c for c in COLUMNS if c not in source.schema_arrow.names]
    if missing:
        raise UserError(f"{path}: no column {missing[0]!r}; the columns of data/schema.py are all needed.")
    number = 0
    for group in source.iter_batches(batch_size=64, columns=list(COLUMNS)):
        for row in group.to_pylist():
            check(row, path, number)
            number += 1
    if number == 0:
        raise UserError(f"{path}: holds no rows; prepare the data set again.")
    return number


def read(path: Path) -> Dataset:
    """A memory-mapped data set with decoded images, every row checked; raises `UserError` for a bad file."""
    validate(path)
    return Dataset.from_parquet(str(path), features=FEATURES)
