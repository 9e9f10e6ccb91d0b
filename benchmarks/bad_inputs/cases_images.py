"""Picture files that cannot be shown to a model, as `data.audit` comes across them."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.bad_inputs import Case


def _saved(format_: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format_)
    return buffer.getvalue()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, depth: int, *chunks: bytes) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + _chunk(b"IEND", b"")


def _flipped(content: bytes) -> bytes:
    """The file with one byte of its pixels changed."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


def _words(cell: Callable[[], dict[str, Any]]) -> Callable[[Path], list[str]]:
    """A training split whose second row holds `cell`."""

    def arguments(folder: Path) -> list[str]:
        kind = pa.schema(
            [("id", pa.string()), ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
        )
        good = {"bytes": _saved("PNG"), "path": None}
        rows = [{"id": "row-0", "image": good}, {"id": "row-1", "image": cell()}]
        for name in ("train", "test"):
            used = rows if name == "train" else rows[:1]
            pq.write_table(pa.Table.from_pylist(used, schema=kind), folder / f"{name}.parquet")
        out = str(folder / "audit")
        return [str(folder / "train.parquet"), str(folder / "test.parquet"), "--out", out]

    return arguments


def _case(kind: str, content: Callable[[], bytes], says: str) -> Case:
    cell = _words(lambda: {"bytes": content(), "path": None})
    return Case(kind, "data.audit", cell, f"row row-1, column image: {says}")


def _named(kind: str, path: str, says: str) -> Case:
    return Case(
        kind, "data.audit", _words(lambda: {"bytes": None, "path": path}), f"row row-1, column image: {says}"
    )


_CLEAR = _chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))
CASES = (
    _case("picture: a web page", lambda: b"<!DOCTYPE html><p>404</p>", "is not a readable image"),
    _case("picture: a Git LFS pointer", lambda: b"version https://git-lfs.github.com/spec/v1\n", "is not"),
    _case("picture: PNG cut short", lambda: _saved("PNG")[:-2000], "is not a whole image"),
    _case("picture: JPEG cut short", lambda: _saved("JPEG")[:-500], "is not a whole image"),
    _case("picture: WebP cut short", lambda: _saved("WEBP")[:-500], "is not"),
    _case("picture: PNG with a changed byte", lambda: _flipped(_saved("PNG")), "is not a whole image"),
    _case("picture: PNG without pixels", lambda: _png(64, 48, 8), "is not"),
    _case("picture: a bomb of 1.6e9 pixels", lambda: _png(40000, 40000, 8), "has more than 80000000 pixels"),
    _case("picture: 85 million pixels", lambda: _png(8500, 10000, 8), "has 8500 x 10000 pixels"),
    _case("picture: a TIFF", lambda: _saved("TIFF"), "is not a readable image (PNG, JPEG, WEBP)"),
    _case(
        "picture: a clear colour of 16 bits",
        lambda: _png(1, 1, 16, _CLEAR, _chunk(b"IDAT", zlib.compress(b"\0" + bytes(6)))),
        "names a transparent colour of 16 bits a channel",
    ),
    _named("picture: file that is not there", "images/1.png", ""),
    _named("picture: path out of the folder", "../1.png", "'../1.png' is not a path inside the data folder"),
    _named("picture: absolute path", "/images/1.png", "'/images/1.png' is not a path inside"),
)
