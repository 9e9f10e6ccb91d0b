"""Builds a folder in the layout of the published set, for tests and benchmarks.

The layout is that of public code which ran on the real files: RGB PNG images of 1,500 to 5,304 x 1,500 to 3,333 pixels
(times `scale`), a red frame of 3 px round the box widened by 5% a side; the crop is that region widened by 5% a side
again, cut at the border, with a frame of 5 px in the same place, enlarged twice with Lanczos. Boxes have the published
spread of areas (median 0.0111, most 0.09995 of the image); the first rows are the geometries at the edges of it
(`EDGES`). Every fifth row asks about the image of the row before it. The images' archive is split into parts; archives
are gzip files without compression, since PNG does not compress further.

Scenes are made up: colours that change slowly, blots and a fine grain, so that no place looks like another one.
"""

import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw

SCALE = 0.2
HINT = "Only focus on the objects inside the red bounding box in the image to answer this question."
INSTRUCTION = "Answer with the option's letter from the given choices."
RED = (255, 0, 0)
MEDIAN_AREA, MOST_AREA = 0.0111, 0.09995
EDGES = (  # width, height, box; at the size they have
    (5304, 3333, (1000, 700, 2324, 2033)),  # the largest image, a box just below a tenth of it
    (1500, 1500, (700, 600, 711, 614)),  # the smallest crop, 26 x 34
    (1600, 1500, (100, 40, 142, 170)),  # narrow
    (1600, 1500, (200, 300, 1200, 400)),  # wide
    (1500, 1500, (3, 71, 98, 126)),  # cut at the border
    (1500, 1600, (1310, 1480, 1500, 1600)),  # in a corner
)
Box = tuple[int, int, int, int]
Geometry = tuple[int, int, Box]
ROWS_AT_ONCE = 16
FAST_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY]


def geometry(index: int, scale: float) -> Geometry:
    """Width, height and box of the image of a row."""
    if index < len(EDGES) and scale == 1:
        return EDGES[index]
    rng = np.random.default_rng((7, index))
    width, height = (round(scale * int(rng.integers(1500, most + 1))) for most in (5304, 3333))
    area = min(MOST_AREA * 0.99, MEDIAN_AREA * float(np.exp(rng.normal())))
    ratio = float(np.exp(0.4 * rng.normal()))
    w = int(np.clip(round(np.sqrt(area * width * height * ratio)), 12, width * 0.58))
    h = int(np.clip(round(area * width * height / w), 12, min(height - 1, MOST_AREA * width * height / w)))
    x0, y0 = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
    return width, height, (x0, y0, x0 + w, y0 + h)


def grown(box: Box, width: int, height: int) -> Box:
    """A box widened by 5% a side, in whole pixels, cut at the border."""
    x0, y0, x1, y1 = box
    more = 0.05 * (x1 - x0), 0.05 * (y1 - y0)
    return (
        max(0, int(x0 - more[0])), max(0, int(y0 - more[1])),
        min(width, int(x1 + more[0])), min(height, int(y1 + more[1])),
    )  # fmt: skip


def scene(index: int, width: int, height: int) -> Image.Image:
    """A picture that looks the same nowhere."""
    rng = np.random.default_rng((11, index))
    slow = cv2.resize(
        rng.integers(30, 200, (12, 16, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC
    )
    middle = rng.integers(0, 56, (max(2, height // 12), max(2, width // 12), 3), dtype=np.uint8)
    slow = cv2.add(slow, cv2.resize(middle, (width, height), interpolation=cv2.INTER_LINEAR))
    grain = rng.integers(0, 4, (211, 223, 3), dtype=np.uint8)
    tiled = np.tile(grain, (height // 211 + 1, width // 223 + 1, 1))[:height, :width]
    return Image.fromarray(cv2.add(slow, tiled))


def framed(picture: Image.Image, box: Box, width: int) -> Image.Image:
    copy = picture.copy()
    ImageDraw.Draw(copy).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=RED, width=width)
    return copy


def png(picture: Image.Image) -> bytes:
    pixels = cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(".png", pixels, FAST_PNG)[1])


def published_row(
    index: int, scale: float = SCALE, frames: tuple[bool, bool] = (True, True)
) -> tuple[dict, dict[str, Image.Image]]:
    """A row of train.jsonl, and its pictures by column. frames: whether image and crop have theirs."""
    shown = index - 1 if index % 5 == 4 else index
    width, height, box = geometry(shown, scale)
    original = scene(shown, width, height)
    frame = grown(box, width, height)
    region = grown(frame, width, height)
    crop = original.crop(region)
    if frames[1]:
        inside = tuple(edge - region[i % 2] for i, edge in enumerate(frame))
        crop = framed(crop, inside, max(2, round(5 * min(1, 2 * scale))))  # type: ignore[arg-type]
    image = framed(original, frame, max(2, round(3 * scale))) if frames[0] else original
    options = [f"thing {(37 * shown + 11 * i) % 997}" for i in range(4)]
    if index % 7 == 3:
        options[1] = options[0].upper()  # options of some rows differ in case alone
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
    asked = f"What is thing number {shown}?" if index % 5 != 4 else f"Once more: what is number {shown}?"
    row = {
        "images": [f"images/{index:06d}.png"],
        "teacher_images": [f"teacher_images/{index:06d}.png"],
        "original_images": [f"original_images/{index:06d}.png"],
        "problem": f"<image>\n{asked}\n\n{HINT}\n\n{listed}\n\n{INSTRUCTION}",
        "answer": "ABCD"[shown % 4],
        "bbox": list(box),
        "extra_info": {"index": index},
    }
    large = crop.resize((2 * crop.width, 2 * crop.height), Image.Resampling.LANCZOS)
    return row, {"images": image, "teacher_images": large, "original_images": original}


def build(
    folder: Path,
    rows: int,
    parts: int = 3,
    change: Callable[[int, dict], object] | None = None,
    pictures: Callable[[int, dict], dict] | None = None,
    bare: bool = False,
    originals: bool = False,
    scale: float = SCALE,
) -> Path:
    """The whole folder. change(index, row) may spoil rows of train.jsonl, pictures(index, pictures) their pictures.
    bare: archives do not name their folder. originals: the pictures without a box come along.
    """
    names = ["images", "teacher_images", *(["original_images"] if originals else [])]
    for name in names:
        (folder / name).mkdir(parents=True)

    def made(index: int) -> tuple[dict, dict[str, bytes]]:
        row, shown = published_row(index, scale)
        if pictures:
            shown = pictures(index, shown)
        return row, {name: png(shown[name]) for name in names}

    with (folder / "train.jsonl").open("w") as lines:
        archives = {
            name: tarfile.open(folder / name / f"{name}.tar.gz", "w:gz", compresslevel=0)  # noqa: SIM115
            for name in names
        }
        for index, (row, files) in enumerate(_in_turn(made, rows)):
            for name, content in files.items():
                path = row[name][0]
                add(archives[name], Path(path).name if bare else path, content)
            lines.write(json.dumps(change(index, row) if change else row) + "\n")
        for archive in archives.values():
            archive.close()
    split(folder / "images" / "images.tar.gz", parts)
    return folder


def _in_turn(made: Callable[[int], tuple], rows: int) -> Iterator[tuple]:
    """made(0), made(1) ..., few at a time."""
    cv2.setNumThreads(1)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for first in range(0, rows, ROWS_AT_ONCE):
            yield from pool.map(made, range(first, min(rows, first + ROWS_AT_ONCE)))


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
    archive.members.clear()


def split(file: Path, parts: int) -> None:
    """Cuts a file into parts `<name>00`, `<name>01` ..., as the published ones are, and removes it."""
    size = -(-file.stat().st_size // parts)
    with file.open("rb") as content:
        for i in range(parts):
            with file.with_name(f"{file.name}{i:02d}").open("wb") as part:
                left = size
                while left and (block := content.read(min(left, 1 << 20))):
                    part.write(block)
                    left -= len(block)
    file.unlink()


def archive_of(path: Path, members: Iterable[tuple[tarfile.TarInfo, bytes]], mode: str = "w:gz") -> Path:
    """A tar archive of members made by hand, malicious ones included."""
    with tarfile.open(path, mode) as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


if __name__ == "__main__":
    build(Path(sys.argv[1]), int(sys.argv[2]), parts=6, scale=float(sys.argv[3]))
