"""The triplet row (full image, crop, question) as parquet: columns, check, readers and streaming writers.

Every data set of the project -- the generated miniature, prepared or synthesised sets -- is a folder of splits of
these rows. A split is named by `<folder>/<split>.parquet`: that file, or shards beside it
(`<split>-00000-of-00003.parquet`). An image cell holds an encoded file, or the path of one relative to the folder;
either way the folder can be moved.
"""

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from data import parquet_files
from vopd.common import caches, images, ownership
from vopd.common.provenance import hash_contents
from vopd.errors import UserError

FEATURES = Features(
    {
        "id": Value("string"),
        "image": Image(),
        "original": Image(),
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
        "provenance": Value("string"),
        "split": Value("string"),
    }
)
COLUMNS = tuple(FEATURES)
IMAGES = ("image", "crop")
ALL_IMAGES = ("image", "original", "crop")
FORMATS = images.FORMATS
MAX_PIXELS = images.MAX_PIXELS
MAX_BYTES = images.MAX_BYTES
ImageTooLargeError = images.ImageTooLargeError
BATCH_BYTES = parquet_files.BATCH_BYTES
Check = Callable[[Mapping[str, Any], Path, int], None]
_SHARD = re.compile(r"(?P<split>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})")


@dataclass(frozen=True)
class Outline:
    """An image of which only the size is known: enough to count a prompt's tokens."""

    width: int
    height: int

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


class Triplet(TypedDict):
    """One row. Image cells are `{"bytes": ..., "path": None}` or `{"bytes": None, "path": "images/1.jpg"}` in a file
    and RGB PIL images when read.

    image: what the student sees, the red box drawn. original: the same without the box, None if it is not known.
    box: x0, y0, x1, y1 in pixels of `image`, right and bottom exclusive; the crop shows it, in published rows with some
    margin (`crop_match.widened`). question: the whole text shown to
    the model. hint: the part of it that says where to look. answer: for type `letter`, A, B, C ... family: kind of
    question, for results by kind. source: data set. licence: of the images. provenance: where exactly the row comes
    from (revision and file, seed, ...), possibly empty.
    """

    id: str
    image: object
    original: object
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
    provenance: str
    split: str


# ---- image cells ----------------------------------------------------------------------------------------------------


def encode(picture: PILImage.Image) -> dict[str, Any]:
    """A PIL image as the PNG bytes a row carries."""
    return {"bytes": images.png(picture), "path": None}


def image_file(path: str, folder: Path) -> Path:
    """The file that a cell's path names. `UserError` unless it is relative and stays inside the folder."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
        raise UserError(f"{path!r} is not a path inside the data folder; write it relative, without '..'.")
    file = folder / path
    try:
        inside = file.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # too long a name, circular links
        inside = False
    if not inside:
        raise UserError(f"{path!r} leads out of the data folder {folder}; copy the image into it.")
    return file


def _file_of(cell: Mapping[str, Any], folder: Path) -> Path:
    """The image file that a cell without bytes names."""
    if not cell.get("path"):
        raise UserError("holds no image: neither bytes nor the path of a file.")
    file = image_file(cell["path"], folder)
    try:
        found = file.stat()
    except OSError as error:
        raise UserError(f"{file}: not readable ({error.strerror}).") from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{file}: not a file; name the image.")
    if found.st_size > MAX_BYTES:
        raise ImageTooLargeError(f"{file}: has more than {MAX_BYTES} bytes; shrink the image.")
    return file


def image_bytes(cell: Mapping[str, Any], folder: Path) -> bytes:
    """The encoded image of a cell. `UserError` if it has none or names a file that is not there."""
    return bytes(cell["bytes"]) if cell.get("bytes") else _file_of(cell, folder).read_bytes()


def open_image(cell: Mapping[str, Any], folder: Path) -> images.Picture:
    """The image of a cell, header read, pixels not yet decoded: `.size` is known, `.rgb()` decodes.

    Raises:
        UserError: no image, or a format outside `FORMATS`.
        ImageTooLargeError: more than `MAX_PIXELS` pixels.
    """
    return images.open_picture(bytes(cell["bytes"]) if cell.get("bytes") else _file_of(cell, folder))


def outline(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The row with `Outline`s for its images, read from their headers; no pixel is decoded. `UserError` as above."""
    outlined = dict(row)
    for column in IMAGES:
        try:
            with open_image(row[column] or {}, folder) as picture:
                outlined[column] = Outline(*picture.size)
        except UserError as error:
            raise UserError(f"row {row['id']}, column {column}: {error}") from error
    return outlined


def link_or_copy(file: Path, target: Path) -> None:
    """A second name for a file; a copy where the file system has no hard links."""
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copyfile(file, target)


def decode_image(cell: Mapping[str, Any], folder: Path) -> PILImage.Image:
    """The image of a cell as shown, RGB. `UserError` as `open_image`, or for a file that is cut short or broken."""
    with open_image(cell, folder) as picture:
        return picture.rgb()


# ---- one row --------------------------------------------------------------------------------------------------------


def check(row: Mapping[str, Any], file: Path, number: int) -> None:
    """Raises `UserError` naming file, row and column if an encoded row breaks the schema."""
    check_texts(row, file, number)
    sizes = {}
    for column in ALL_IMAGES:
        if (cell := row.get(column)) is None:
            continue
        try:
            with open_image(cell, file.parent) as picture:
                picture.verify()
                sizes[column] = picture.size
        except UserError as error:
            raise _wrong(file, number, column, str(error).rstrip(".")) from error
    width, height = sizes["image"]
    box = row["box"]
    if len(box) != 4 or not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
        what = f"{box} is not x0, y0, x1, y1 inside the {width} x {height} image"
        raise _wrong(file, number, "box", what)


def check_texts(row: Mapping[str, Any], file: Path, number: int) -> None:
    """As `check`, of all but the pictures and the box in them: for rows whose pictures were just decoded."""

    def wrong(column: str, what: str) -> UserError:
        return _wrong(file, number, column, what)

    for column in COLUMNS:
        if row.get(column) is None and column != "original":
            raise wrong(column, "is missing; every row needs all columns of data/schema.py but `original`")
    if not row["question"].strip():
        raise wrong("question", "must be text")
    if row["hint"] not in row["question"]:
        raise wrong("hint", "must be a part of the question, or empty")
    if row["answer_type"] == "letter" and row["answer"] not in letters(row["options"]):
        raise wrong(
            "answer", f"{row['answer']!r} is not the letter of one of the {len(row['options'])} options"
        )


def _wrong(file: Path, number: int, column: str, what: str) -> UserError:
    return UserError(f"{file}: row {number}, column {column!r}: {what}.")


def letters(options: Sequence[str]) -> list[str]:
    """A, B, C ... for each option."""
    return [chr(ord("A") + i) for i in range(len(options))]


# ---- files of a split -----------------------------------------------------------------------------------------------


def shards(path: Path) -> list[Path]:
    """Files of the split named by `<folder>/<split>.parquet`: that file, or its shards in order.

    Raises:
        UserError: there is none, a shard is missing, or both forms are there.
    """
    found = {}
    for file in path.parent.glob(f"{path.stem}-*{path.suffix}"):
        match = _SHARD.fullmatch(file.stem)
        if match and match["split"] == path.stem:
            found[file] = int(match["index"]), int(match["count"])
    if path.is_file():
        if found:
            raise UserError(f"{path}: there are shards of it as well; remove the file or the shards.")
        return [path]
    if not found:
        raise UserError(f"{path}: no such file; prepare the data set first.")
    count = max(c for _, c in found.values())
    if sorted(found.values()) != [(i, count) for i in range(count)]:
        raise UserError(
            f"{path}: its shards are not {count} files numbered from 0; prepare the data set again."
        )
    return sorted(found)


def splits(folder: Path) -> list[Path]:
    """`<folder>/<split>.parquet` for every split there is, whole or in shards, by name."""
    stems = {file.stem for file in folder.glob("*.parquet")}
    names = {match["split"] if (match := _SHARD.fullmatch(stem)) else stem for stem in stems}
    return [folder / f"{name}.parquet" for name in sorted(names)]


def _wanted(columns: Sequence[str]) -> pa.Schema:
    return pa.schema([FEATURES.arrow_schema.field(name) for name in columns])


def examined(path: Path, columns: Sequence[str] = COLUMNS) -> Iterator[parquet_files.Row]:
    """Encoded rows of a split, few in memory at a time, with what could not be read of them in their `problems`.

    Raises:
        UserError: a file that cannot be read, or a column that is missing or of another type.
    """
    wanted = _wanted(columns)
    for file in shards(path):
        with parquet_files.opened(file, wanted) as source:
            yield from parquet_files.rows(source, file, wanted)


def rows(path: Path, columns: Sequence[str] = COLUMNS) -> Iterator[dict[str, Any]]:
    """As `examined`, and a `UserError` for the first value that does not have its column's type."""
    for number, row in enumerate(examined(path, columns)):
        yield _whole(row, path, number)


def rows_at(
    path: Path, numbers: Collection[int], columns: Sequence[str] = COLUMNS
) -> Iterator[dict[str, Any]]:
    """Some rows of a split by their numbers (from 0), in order; row groups without one of them are not read."""
    wanted, first = _wanted(columns), 0
    for file in shards(path):
        with parquet_files.opened(file, wanted) as source:
            for group in range(source.metadata.num_row_groups):
                size = source.metadata.row_group(group).num_rows
                here = [n - first for n in numbers if first <= n < first + size]
                if here:
                    found = islice(parquet_files.rows(source, file, wanted, [group]), max(here) + 1)
                    yield from (_whole(row, path, first + i) for i, row in enumerate(found) if i in here)
                first += size


def _whole(row: parquet_files.Row, path: Path, number: int) -> dict[str, Any]:
    """The row; `UserError` if something of it could not be read."""
    for column, reason in row.problems:
        raise UserError(f"{path}: row {row.get('id') or number}, column {column!r} {reason}.")
    return dict(row)


def count_rows(path: Path, columns: Sequence[str] = ()) -> int:
    """Number of rows of a split, from the files' footers; `UserError` if one lacks any of `columns`."""
    total = 0
    for file in shards(path):
        with parquet_files.opened(file, _wanted(columns)) as source:
            total += source.metadata.num_rows
    return total


def split_hash(path: Path) -> str:
    """sha256 over the split's files, and over name, size and content of every image they name by path."""
    digest = hashlib.sha256()
    for file in shards(path):
        digest.update(bytes.fromhex(hash_contents([file])))
    named: dict[Path, None] = {}
    for row in _paths(path):
        for cell in row.values():
            if cell and cell["path"]:
                try:
                    size = image_file(cell["path"], path.parent).stat().st_size
                    named[path.parent / cell["path"]] = None
                except (OSError, UserError):
                    size = -1  # validation says what is wrong with it
                digest.update(f"{cell['path']}\0{size}\n".encode())
    if named:
        digest.update(hash_contents(named).encode())
    return digest.hexdigest()


def _paths(path: Path) -> Iterator[parquet_files.Row]:
    """Image cells of a split without their bytes."""
    cell = pa.struct([("path", pa.string())])
    wanted = pa.schema([(column, cell) for column in ALL_IMAGES])
    for file in shards(path):
        with parquet_files.opened(file, wanted) as source:
            yield from parquet_files.rows(source, file, wanted)


# ---- writing --------------------------------------------------------------------------------------------------------


def write(
    rows: Iterable[dict[str, Any]],
    path: Path,
    batch: int = 256,
    owned: ownership.Owned | None = None,
    check: Check = check,
) -> int:
    """Streams encoded rows to one parquet file; returns their number.

    At most `batch` rows or about `BATCH_BYTES` of images are in memory. Every row is held to `check`. The file appears
    under its name only when it is complete. owned: the claim on the folder of a command that writes into it.
    """
    with _filling(path, owned) as partial_file:
        return _write(rows, partial_file, path, 0, batch, check)


def write_shards(
    rows: Iterable[dict[str, Any]],
    path: Path,
    rows_per_shard: int,
    batch: int = 256,
    owned: ownership.Owned | None = None,
) -> int:
    """As `write`, in shards `<split>-00000-of-00003.parquet`. They get their names when all of them are complete."""
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard is {rows_per_shard}; at least one row a shard is needed")
    source, count = iter(rows), 0
    parts: list[Path] = []
    following = next(source, None)
    with ownership.scratch(path.parent) as place:
        while following is not None or not parts:
            parts.append(place / f"{len(parts):05d}")
            count += _write(_take(following, source, rows_per_shard), parts[-1], path, count, batch, check)
            following = next(source, None)
        for old in path.parent.glob(f"{path.stem}-*-of-*{path.suffix}"):
            old.unlink()
        path.unlink(missing_ok=True)
        for index, part in enumerate(parts):
            name = f"{path.stem}-{index:05d}-of-{len(parts):05d}{path.suffix}"
            with _filling(path.with_name(name), owned) as partial_file:
                part.replace(partial_file)
    return count


def _filling(file: Path, owned: ownership.Owned | None) -> AbstractContextManager[Path]:
    return owned.writing(file.name) if owned else ownership.atomic(file)


def _write(
    rows: Iterable[dict[str, Any]], file: Path, split: Path, first: int, batch: int, check: Check
) -> int:
    """Writes one file of the split `split`, whose rows so far are `first`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with pq.ParquetWriter(file, FEATURES.arrow_schema, compression="zstd") as writer:
        for group in batched_rows(rows, batch):
            for offset, row in enumerate(group):
                check(row, split, first + count + offset)
            writer.write_table(pa.Table.from_pylist(group, schema=FEATURES.arrow_schema))
            count += len(group)
    return count


def _take(
    first: dict[str, Any] | None, rest: Iterator[dict[str, Any]], most: int
) -> Iterator[dict[str, Any]]:
    """`first` and up to `most` - 1 of the rest; no more is drawn than is handed out."""
    if first is None:
        return
    yield first
    for _ in range(most - 1):
        following = next(rest, None)
        if following is None:
            return
        yield following


def batched_rows(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Lists of up to `size` rows; a list ends earlier when its images reach `BATCH_BYTES`."""
    group: list[dict[str, Any]] = []
    held = 0
    for row in rows:
        group.append(row)
        held += sum(len(cell.get("bytes") or b"") for c in ALL_IMAGES if isinstance(cell := row.get(c), dict))
        if len(group) == size or held >= BATCH_BYTES:
            yield group
            group, held = [], 0
    if group:
        yield group


# ---- reading --------------------------------------------------------------------------------------------------------


def check_split(path: Path) -> int:
    """Checks columns and every row of a split without holding it in memory; returns the number of rows."""
    number = 0
    for row in rows(path):
        check(row, path, number)
        number += 1
    if number == 0:
        raise UserError(f"{path}: holds no rows; prepare the data set again.")
    return number


def encoded(files: Sequence[Path]) -> Dataset:
    """A memory-mapped data set of parquet files; image cells stay `{"bytes", "path"}`, columns have their own types.

    The library keeps its converted copy by path and time of change, so a file that was replaced by one of the same time
    would be read from the old copy: each content gets a folder of its own.
    """
    there = pq.read_schema(files[0]).names
    features = Features(
        {n: Image(decode=False) if n in ALL_IMAGES else kind for n, kind in FEATURES.items() if n in there}
    )
    return Dataset.from_parquet(
        [str(file) for file in files],
        features=features,
        columns=list(features),
        batch_size=parquet_files.MOST_ROWS,
        keep_in_memory=False,
        cache_dir=str(caches.workspace("datasets", hash_contents(files))),
    )


def read(path: Path) -> Dataset:
    """A memory-mapped data set with images decoded at access, every row checked; `UserError` for a bad split."""
    check_split(path)
    return encoded(shards(path)).with_transform(partial(_decoded, folder=path.parent))


def _decoded(columns: dict[str, list[Any]], folder: Path) -> dict[str, list[Any]]:
    return {
        name: [cell and decode_image(cell, folder) for cell in cells] if name in ALL_IMAGES else cells
        for name, cells in columns.items()
    }
