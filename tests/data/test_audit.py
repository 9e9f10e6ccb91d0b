"""The audit finds re-encoded, resized and boxed copies and leaves what is merely similar alone."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import audit, schema
from data.miniature import prepare, world
from data.near_duplicates import perceptual_hash
from data.synthesis.pipeline import draw_box
from vopd.common import ownership

SAMPLES = Path(skimage.__file__).parent / "data"
NAMES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "gravel.png",
    "page.png",
)
PHOTOGRAPHS = {Path(name).stem: Image.open(SAMPLES / name).convert("RGB") for name in sorted(NAMES)}


def jpeg(picture: Image.Image, quality: int = 60) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file with ids and images alone, as a benchmark may have."""
    cell = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kinds = {"id": pa.string(), "image": cell, "original": cell}
    used = pa.schema([(name, kind) for name, kind in kinds.items() if name in rows[0]])
    pq.write_table(pa.Table.from_pylist(rows, schema=used), path)
    return path


def cell(content: bytes | Image.Image) -> dict[str, Any]:
    return {"bytes": content, "path": None} if isinstance(content, bytes) else schema.encode(content)


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(PHOTOGRAPHS)),
    quality=st.integers(50, 100),
    scale=st.floats(0.4, 1.6),
    boxed=st.booleans(),
    corner=st.tuples(st.floats(0, 0.7), st.floats(0, 0.7)),
    side=st.floats(0.08, 0.3),
)
def test_a_copy_is_within_both_limits(
    name: str, quality: int, scale: float, boxed: bool, corner: tuple[float, float], side: float
) -> None:
    picture = PHOTOGRAPHS[name]
    copy = picture
    width, height = picture.size
    if boxed:
        x, y = int(corner[0] * width), int(corner[1] * height)
        copy = draw_box(copy, [x, y, x + int(side * width), y + int(side * height)], 0.05, 5)
    copy = copy.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    copy = Image.open(io.BytesIO(jpeg(copy, quality))).convert("RGB")
    bits = (perceptual_hash(picture) ^ perceptual_hash(copy)).bit_count()
    value = audit.correlation(audit.thumbnail(picture), audit.thumbnail(copy))
    assert bits <= audit.DISTANCE and value >= audit.CORRELATION


def test_correlation_has_the_properties_of_one() -> None:
    small = {name: audit.thumbnail(picture) for name, picture in PHOTOGRAPHS.items()}
    names = sorted(small)
    for i, one in enumerate(names):
        assert audit.correlation(small[one], small[one]) == pytest.approx(1, abs=1e-5)
        for two in names[i + 1 :]:
            value = audit.correlation(small[one], small[two])
            assert value == pytest.approx(audit.correlation(small[two], small[one]), abs=0.05)
            assert value < 0.3
    white, grey = (np.full((40, 60, 3), shade, np.uint8) for shade in (255, 90))
    assert audit.correlation(white, white) == 1 and audit.correlation(white, grey) == 0
    assert audit.correlation(white, small["coffee"]) == 0
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    assert audit.correlation(noise, 255 - noise) < -0.9


def test_brightness_and_contrast_do_not_hide_a_copy() -> None:
    picture = np.asarray(PHOTOGRAPHS["coffee"])
    changed = Image.fromarray((picture * 0.7 + 40).astype(np.uint8))
    assert audit.correlation(audit.thumbnail(PHOTOGRAPHS["coffee"]), audit.thumbnail(changed)) > 0.98


@given(
    test=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=300),
    train=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5),
    distance=st.integers(0, 40),
)
def test_candidates_are_all_pairs_within_the_distance(
    test: list[int], train: list[int], distance: int
) -> None:
    found = set(audit.candidates(np.array(test, np.uint64), np.array(train, np.uint64), distance))
    bits = {(i, j): (a ^ b).bit_count() for i, a in enumerate(test) for j, b in enumerate(train)}
    assert found == {(i, j, b) for (i, j), b in bits.items() if b <= distance}


class Tags(HTMLParser):
    """Collects what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [str(value) for name, value in attrs if name in ("src", "href")]


def test_copies_among_photographs_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["astronaut", "coffee", "gravel", "chelsea", "motorcycle_left"]
    boxed = draw_box(PHOTOGRAPHS["page"], [60, 40, 160, 90], 0.05, 5)
    train = table(
        tmp_path / "train.parquet",
        [{"id": f"train {name}", "image": cell(PHOTOGRAPHS[name]), "original": None} for name in names]
        + [{"id": "train <page>", "image": cell(boxed), "original": cell(PHOTOGRAPHS["page"])}],
    )
    half = PHOTOGRAPHS[names[1]].resize([side // 2 for side in PHOTOGRAPHS[names[1]].size])
    right = Image.open(SAMPLES / "motorcycle_right.png").convert("RGB")  # the other eye of a stereo pair
    test = table(
        tmp_path / "bench.parquet",
        [
            {"id": "recoded", "image": cell(jpeg(PHOTOGRAPHS[names[0]]))},
            {"id": "halved", "image": cell(half)},
            {"id": "page", "image": cell(jpeg(PHOTOGRAPHS["page"]))},
            {"id": "other eye", "image": cell(right)},
            {"id": "other", "image": cell(PHOTOGRAPHS["rocket"])},
        ],
    )
    arguments = [str(train), str(test), "--out", str(tmp_path / "out"), "--benchmark", "V*"]
    assert audit.main(arguments) == 0
    assert capsys.readouterr().out.startswith("3 of 5 test rows are copies")
    record = json.loads((tmp_path / "out" / "excluded.json").read_text())
    assert record["benchmark"] == "V*" and record["train"] == str(train)
    assert record["excluded"] == ["halved", "page", "recoded"]
    assert record["method"]["distance"] == audit.DISTANCE and record["method"]["tested"] == 5
    pairs = {pair["test"]: pair for pair in record["pairs"]}
    assert (pairs["page"]["train"], pairs["page"]["train_column"]) == ("train <page>", "original")
    assert pairs["halved"]["train"] == f"train {names[1]}"
    page = (tmp_path / "out" / "audit.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert len(tags.loads) == 6 and all(load.startswith("data:image/jpeg;base64,") for load in tags.loads)
    assert "train &lt;page&gt;" in page and not re.search(r"https?:", page)
    capsys.readouterr()
    assert audit.main(arguments) == 0  # over its own files, as an earlier version left them too
    (tmp_path / "out" / ownership.LEDGER).unlink()
    ownership.claim(tmp_path / "out", audit.MAKER, audit.NAMES, recognise=audit._made_before)
    (tmp_path / "out" / "excluded.json").write_text(json.dumps(record | {"excluded": ["page"]}))
    assert audit.main(arguments) == 2
    assert "excluded.json: changed since data.audit made it" in capsys.readouterr().err


def test_scenes_of_one_world_are_not_copies_of_each_other(tmp_path: Path) -> None:
    train, test = (tmp_path / f"{split}.parquet" for split in ("train", "test"))
    schema.write(prepare.rows("train", 150, 0), train)
    copies = [world.scene(0, "train", index) for index in (3, 77)]
    rows = list(prepare.rows("test", 150, 0))
    for row, scene in zip(rows, copies, strict=False):  # another box would be drawn: here none is
        row["image"] = cell(jpeg(Image.fromarray(scene.plain).resize((112, 112))))
        row["box"] = [20, 20, 44, 44]
    schema.write(rows, test)
    pairs, _, tested = audit.audit(train, test)
    assert tested == 150
    assert [(pair.test, pair.train) for pair in pairs] == [
        (rows[0]["id"], copies[0].id),
        (rows[1]["id"], copies[1].id),
    ]


@pytest.mark.parametrize("wrong", ["absent", "text", "no id", "broken image", "empty"])
def test_bad_input_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str) -> None:
    good = table(tmp_path / "good.parquet", [{"id": "a", "image": cell(PHOTOGRAPHS["coffee"])}])
    bad = tmp_path / "bad.parquet"
    if wrong == "text":
        bad.write_text("no parquet")
    elif wrong == "no id":
        pq.write_table(pa.table({"image": [1]}), bad)
    elif wrong == "broken image":
        table(bad, [{"id": "row 7", "image": cell(jpeg(PHOTOGRAPHS["coffee"])[:5000])}])
    elif wrong == "empty":
        pq.write_table(pq.read_table(good).slice(0, 0), bad)
    assert audit.main([str(good), str(bad), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "bad.parquet" in message and (wrong != "broken image" or "row 7" in message)
    assert not (tmp_path / "out").exists()


def test_a_copy_that_is_stored_sideways_is_found(tmp_path: Path) -> None:
    picture = PHOTOGRAPHS["astronaut"].crop((0, 0, 512, 400))
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(buffer, "JPEG", quality=90, exif=exif)
    train = table(tmp_path / "train.parquet", [{"id": "t", "image": cell(picture)}])
    test = table(tmp_path / "test.parquet", [{"id": "q", "image": cell(buffer.getvalue())}])
    (pair,), _, _ = audit.audit(train, test)
    assert (pair.test, pair.train) == ("q", "t")
