"""Builds a folder in exactly the layout of the published set, from the miniature, for tests.

Scenes are enlarged four times and stored as JPEG; crops are cut from the enlarged scene without its box, enlarged twice
more (Lanczos) and stored as JPEG, as the published ones were made. Every fifth row asks about the image of the row
before it. The images' archive is split into parts, the crops' archive is whole.
"""

import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image

from data.miniature import world

SCALE = 4
HINT = "Only focus on the objects inside the red bounding box in the image to answer this question."
Style = Callable[[str, tuple[str, ...]], str]


def on_lines(question: str, options: tuple[str, ...]) -> str:
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
    return f"<image>\n{question}\n{listed}\n{HINT}"


def jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def big(pixels) -> Image.Image:
    picture = Image.fromarray(pixels)
    return picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST)


def published_row(index: int, style: Style = on_lines) -> tuple[dict, bytes, bytes]:
    """A row of train.jsonl, and the files of its image and crop."""
    scene = world.scene(0, "train", index - 1 if index % 5 == 4 else index)
    box = [SCALE * edge for edge in scene.box]
    crop = big(scene.plain).crop(tuple(box))
    crop = crop.resize((2 * crop.width, 2 * crop.height), Image.Resampling.LANCZOS)
    asked = scene.question.split("?")[0] + "?"
    if index % 5 == 4:
        asked = "Once more: " + asked
    row = {
        "images": [f"images/{index:06d}.jpg"],
        "teacher_images": [f"teacher_images/{index:06d}.jpg"],
        "problem": style(asked, scene.options),
        "answer": scene.answer,
        "bbox": box,
        "extra_info": {"index": index},
    }
    return row, jpeg(big(scene.image)), jpeg(crop)


def build(
    folder: Path,
    rows: int,
    parts: int = 3,
    change: Callable[[int, dict], dict] | None = None,
    bare: bool = False,
) -> Path:
    """The whole folder. change(index, row) may spoil rows of train.jsonl; bare: archives do not name their folder."""
    files: dict[str, Path] = {}
    for name in ("images", "teacher_images"):
        (folder / name).mkdir(parents=True)
        files[name] = folder / name / f"{name}.tar.gz"
    with (
        (folder / "train.jsonl").open("w") as lines,
        tarfile.open(files["images"], "w:gz", compresslevel=1) as images,
        tarfile.open(files["teacher_images"], "w:gz", compresslevel=1) as crops,
    ):
        for index in range(rows):
            row, image, crop = published_row(index)
            for archive, path, content in (
                (images, row["images"][0], image),
                (crops, row["teacher_images"][0], crop),
            ):
                add(archive, Path(path).name if bare else path, content)
            lines.write(json.dumps(change(index, row) if change else row) + "\n")
    split(files["images"], parts)
    return folder


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def split(file: Path, parts: int) -> None:
    """Cuts a file into parts `<name>.part-aa`, `.part-ab` ..., as `split` would, and removes it."""
    size = -(-file.stat().st_size // parts)
    with file.open("rb") as content:
        for i in range(parts):
            suffix = chr(ord("a") + i // 26) + chr(ord("a") + i % 26)
            file.with_name(f"{file.name}.part-{suffix}").write_bytes(content.read(size))
    file.unlink()


def archive_of(path: Path, members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> Path:
    """A gzipped tar archive of members made by hand, malicious ones included."""
    with tarfile.open(path, "w:gz") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


if __name__ == "__main__":
    build(Path(sys.argv[1]), int(sys.argv[2]))
