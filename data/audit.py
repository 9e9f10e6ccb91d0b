"""Which test images are copies of training images: `vopd data audit TRAIN TEST --out FOLDER`.

Candidates are pairs whose perceptual hashes are close. A candidate is a copy if, brought to one size, the pictures
agree in detail: what a blur takes away must correlate, so that two pictures of the same kind of scene do not count.
Re-encoded, resized and boxed copies are found; cut-outs, turned and mirrored ones are not looked for.

FOLDER/audit.html shows every pair. FOLDER/excluded.json holds the test ids to leave out:
`{"benchmark": ..., "train": ..., "excluded": [ids], "method": {...}, "pairs": [...]}`. Evaluation reports a benchmark
in full and without them.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from data import schema
from data.near_duplicates import perceptual_hash
from vopd.common import ownership
from vopd.common.command import reports_errors
from vopd.common.terminal import visible
from vopd.errors import UserError

# Measured on photographs and generated scenes: copies are up to 16 bits of 64 apart (a frame on a page of text),
# others 14 and more; copies correlate by 0.81 and more, others by 0.13 at most.
DISTANCE = 16
CORRELATION = 0.7
SIDE = 256
BLUR = 0.02
ASPECT_TOLERANCE = 0.05
FLAT = 1.0
PICTURES = ("image", "original")
MAKER = "data.audit"
NAMES = ("audit.html", "excluded.json")

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Contamination audit</title>
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; }
td, th { padding: .4em 1em; text-align: left; vertical-align: top; }
img { max-width: 256px; display: block; }
</style>
<h1>Contamination audit: {{ benchmark }}</h1>
<p>{{ excluded | length }} of {{ tested }} test rows are copies of rows in {{ train }}.
Perceptual hash within {{ method.distance }} bits of 64, correlation of detail at least {{ method.correlation }}.</p>
{% if pairs %}<table><tr><th>test</th><th>train</th><th>bits apart</th><th>correlation</th></tr>
{% for pair in pairs %}<tr>
<td>{{ pair.test }}<img alt="" src="{{ pair.test_picture }}"></td>
<td>{{ pair.train }}<img alt="" src="{{ pair.train_picture }}"></td>
<td>{{ pair.distance }}</td><td>{{ "%.3f" | format(pair.correlation) }}</td></tr>
{% endfor %}</table>{% endif %}
</html>
"""

Key = tuple[str, str, str]  # which set, row id, image column


@dataclass(frozen=True)
class Pair:
    """A test row and the training row it copies, and by which of their columns this shows.

    distance: bits of 64; correlation: of detail, up to 1.
    """

    test: str
    test_column: str
    train: str
    train_column: str
    distance: int
    correlation: float


def pictures(path: Path) -> Iterator[tuple[str, str, Image.Image]]:
    """Row id, column and opened image of every image of a split; needs the columns `id` and `image` alone."""
    for file in schema.shards(path):
        try:
            source = pq.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{file}: not a parquet file; prepare the data set again.") from error
        names = source.schema_arrow.names
        for column in ("id", "image"):
            if column not in names:
                raise UserError(f"{file}: no column {column!r}; an audit needs id and image.")
        columns = [c for c in ("id", *PICTURES) if c in names]
        for group in source.iter_batches(batch_size=16, columns=columns):
            for row in group.to_pylist():
                for column in PICTURES:
                    if row.get(column):
                        where = f"{file}: row {row['id']}, column {column}"
                        yield row["id"], column, _opened(row[column], path.parent, where)


def _opened(cell: dict[str, Any], folder: Path, where: str) -> Image.Image:
    try:
        with schema.open_image(cell, folder) as picture:
            return picture.rgb(at_least=(2 * SIDE, 2 * SIDE))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def hashes(path: Path) -> tuple[list[tuple[str, str]], np.ndarray]:
    """(row id, column) of every image, and their 64-bit perceptual hashes as (n,) uint64."""
    keys, values = [], []
    for row, column, picture in tqdm(
        pictures(path), desc=visible(f"audit: hashes of {path.name}"), disable=None
    ):
        keys.append((row, column))
        values.append(perceptual_hash(picture))
    if not keys:
        raise UserError(f"{path}: holds no rows; prepare the data set again.")
    return keys, np.array(values, np.uint64)


def candidates(test: np.ndarray, train: np.ndarray, distance: int) -> Iterator[tuple[int, int, int]]:
    """(test index, train index, bits apart) of all pairs up to `distance`; test, train: (n,) uint64."""
    for start in range(0, len(test), 256):
        bits = np.bitwise_count(test[start : start + 256, None] ^ train[None])
        for i, j in np.argwhere(bits <= distance).tolist():
            yield start + i, j, int(bits[i, j])


def thumbnail(picture: Image.Image) -> np.ndarray:
    """(height, width, 3) uint8, at most SIDE a side."""
    small = picture.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=None)
    return np.asarray(small)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of the detail of two pictures, -1 to 1; red frames do not count.

    first, second: (height, width, 3) uint8. Both come to the smaller one's size; 0 where their shapes differ.
    """
    if first.size > second.size:
        first, second = second, first
    height, width = first.shape[:2]
    aspects = (width / height) / (second.shape[1] / second.shape[0])
    if not 1 - ASPECT_TOLERANCE < aspects < 1 + ASPECT_TOLERANCE:
        return 0.0
    second = cv2.resize(second, (width, height), interpolation=cv2.INTER_AREA)
    seen = ~cv2.dilate((_red(first) | _red(second)).astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    if seen.mean() < 0.5:  # a red picture, not a frame
        seen[:] = True
    one, two = (_detail(picture, seen) for picture in (first, second))
    spread = one.std() * two.std()
    if one.std() < FLAT or two.std() < FLAT:  # nothing to correlate: alike only if both are flat and equal
        difference = np.abs(first.astype(float) - second.astype(float)).mean()
        return float(one.std() < FLAT and two.std() < FLAT and difference < 2 * FLAT)
    return float(((one - one.mean()) * (two - two.mean())).mean() / spread)


def _red(picture: np.ndarray) -> np.ndarray:
    red, green, blue = (picture[..., i].astype(int) for i in range(3))
    return (red > 140) & (red - np.maximum(green, blue) > 90)


def _detail(picture: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Grey values less their blur where `seen`; what is not seen takes the mean, so that both blurs agree on it."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
    grey[~seen] = grey[seen].mean()
    sigma = max(1.0, BLUR * max(grey.shape))
    return (grey - cv2.GaussianBlur(grey, (0, 0), sigma))[seen]


def audit(
    train: Path, test: Path, distance: int = DISTANCE, threshold: float = CORRELATION
) -> tuple[list[Pair], dict[Key, np.ndarray], int]:
    """Copies (the best pair of columns for each pair of rows), thumbnails of what was compared, number of test rows."""
    test_keys, test_hashes = hashes(test)
    train_keys, train_hashes = hashes(train)
    found = list(candidates(test_hashes, train_hashes, distance))
    wanted = {("test", *test_keys[i]) for i, _, _ in found} | {("train", *train_keys[j]) for _, j, _ in found}
    small: dict[Key, np.ndarray] = {}
    for name, path in (("test", test), ("train", train)):
        if wanted:
            for row, column, picture in tqdm(
                pictures(path), desc=visible(f"audit: candidates in {path.name}"), disable=None
            ):
                if (name, row, column) in wanted:
                    small[name, row, column] = thumbnail(picture)
    best: dict[tuple[str, str], Pair] = {}
    for i, j, bits in found:
        rows = test_keys[i][0], train_keys[j][0]
        value = correlation(small["test", *test_keys[i]], small["train", *train_keys[j]])
        if value >= threshold and (rows not in best or value > best[rows].correlation):
            best[rows] = Pair(*test_keys[i], *train_keys[j], bits, round(value, 4))
    return [best[rows] for rows in sorted(best)], small, len({row for row, _ in test_keys})


def write(folder: Path, record: dict[str, Any], small: dict[Key, np.ndarray], tested: int) -> None:
    """audit.html and excluded.json; `UserError` where files of these names are the user's, or were edited."""
    owned = ownership.claim(folder, MAKER, NAMES, recognise=_made_before)
    rows = [
        {
            **pair,
            "test_picture": _data_url(small["test", pair["test"], pair["test_column"]]),
            "train_picture": _data_url(small["train", pair["train"], pair["train_column"]]),
        }
        for pair in record["pairs"]
    ]
    page = jinja2.Environment(autoescape=True).from_string(PAGE)
    html = page.render(**{**record, "pairs": rows}, tested=tested)
    owned.write_text("audit.html", html)
    owned.write_text("excluded.json", json.dumps(record, indent=1) + "\n")


def _made_before(file: Path) -> bool:
    """Whether an earlier version of the audit wrote this."""
    with file.open("rb") as stream:
        start = stream.read(4096)
    return b"<title>Contamination audit</title>" in start or start.startswith(b'{\n "benchmark": ')


def _data_url(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def arguments() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        prog="vopd data audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train", type=Path, help="the training split, FOLDER/SPLIT.parquet")
    parser.add_argument("test", type=Path, help="the test split; needs the columns id and image")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--benchmark", help="its name in excluded.json; default: the test file's")
    parser.add_argument("--distance", type=int, default=DISTANCE, help="most bits apart, of 64")
    parser.add_argument("--correlation", type=float, default=CORRELATION, help="least correlation of detail")
    return parser


@reports_errors("data.audit")
def main(argv: list[str]) -> int:
    """Exit code 0 whether copies were found or not, 2 for bad input."""
    args = arguments().parse_args(argv)
    ownership.check(args.out, MAKER, NAMES, recognise=_made_before)
    pairs, small, tested = audit(args.train, args.test, args.distance, args.correlation)
    excluded = sorted({pair.test for pair in pairs})
    record = {
        "benchmark": args.benchmark or args.test.stem,
        "train": str(args.train),
        "excluded": excluded,
        "method": {
            "hash": "phash, 64 bits",
            "distance": args.distance,
            "correlation": args.correlation,
            "side": SIDE,
            "tested": tested,
        },
        "pairs": [asdict(pair) for pair in pairs],
    }
    write(args.out, record, small, tested)
    print(
        f"{len(excluded)} of {tested} test rows are copies; {args.out / 'audit.html'} shows {len(pairs)} pairs."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
