"""A picture has the same pixels in training and behind a server (vLLM's decoder)."""

from __future__ import annotations

import asyncio
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data import schema
from vopd.backbone.rollout import decode
from vopd.common import images
from vopd.errors import UserError
from vopd.evaluation import benchmark, evaluate
from vopd.evaluation.endpoint import Endpoint, Sampling
from vopd.evaluation.records import read_records
from vopd.views import VIEWS

_spec = importlib.util.spec_from_file_location("picture_kinds", Path(__file__).with_name("picture_kinds.py"))
assert _spec and _spec.loader
kinds = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kinds)

SAMPLING = Sampling(False, 0.0, 1.0, 8, 0)
ALL = kinds.KINDS | kinds.PUBLISHED


def cell(content: bytes) -> dict[str, Any]:
    return {"bytes": content, "path": None}


def trained_on(content: bytes, view: str) -> Image.Image:
    """What the rollout worker hands to the processor and to vLLM."""
    decoded = decode({"id": "r", "image": cell(content), "crop": cell(content), "question": "What?"})
    return VIEWS[view](decoded)[0]["content"][0]["image"]


@pytest.mark.parametrize("kind", ALL)
def test_pixels_are_the_same_in_training_and_where_an_evaluation_decodes(kind: str) -> None:
    content, expected = ALL[kind]
    size = expected.shape[1], expected.shape[0]
    here = images.decode(content, benchmark.PICTURES)
    assert (here.mode, here.info, here.size) == ("RGB", {}, size)
    assert np.array_equal(np.asarray(here), expected)
    if kind in kinds.KINDS:
        for view in ("full", "crop"):
            assert np.array_equal(np.asarray(trained_on(content, view)), expected)
        row = {"id": "r", "image": cell(content), "crop": cell(content)}
        assert schema.outline(row, Path())["crop"].size == size
    else:
        with pytest.raises(UserError, match="Row r, column image: is not a readable image"):
            trained_on(content, "full")


def test_pixels_are_the_same_behind_a_server(stub: Callable[..., Any]) -> None:
    """A request's body is decoded as `vllm serve` does it."""
    from vllm.multimodal.media import MediaConnector

    server = stub(lambda body: {"text": "A"})
    endpoint = Endpoint(server.url, "stub", SAMPLING, timeout=60)

    async def ask() -> list[Any]:
        return [await endpoint.answer(kind, "full", ALL[kind][0], kind) for kind in ALL]

    replies, connector, wrong = asyncio.run(ask()), MediaConnector(), []
    for (kind, (_, expected)), reply, body in zip(ALL.items(), replies, server.asked, strict=True):
        picture, text = body["messages"][0]["content"]
        seen = connector.fetch_image(picture["image_url"]["url"])
        same = np.array_equal(np.asarray(getattr(seen, "media", seen)), expected)
        if text["text"] != kind or not same or reply.image_in != (expected.shape[1], expected.shape[0]):
            wrong.append(kind)
    assert wrong == []


@pytest.mark.parametrize("kind", ALL)
def test_a_file_is_sent_as_it_is_where_any_server_sees_the_same(kind: str) -> None:
    content, expected = ALL[kind]
    file = images.portable(content, benchmark.PICTURES)
    assert (file.content == content) == (kind in kinds.SENT_AS_THEY_ARE)
    with Image.open(
        io.BytesIO(file.content)
    ) as sent:  # no EXIF, transparency or depth to be read in two ways
        assert Image.MIME[str(sent.format)] == file.media
        assert sent.mode in ("RGB", "L") and not sent.has_transparency_data
        assert np.array_equal(np.asarray(sent.convert("RGB")), expected)


@pytest.mark.parametrize("kind", kinds.BROKEN)
def test_a_broken_picture_is_told_with_its_reason(kind: str) -> None:
    content, reason = kinds.BROKEN[kind]
    for use in (images.decode, images.portable):
        with pytest.raises(images.PictureError, match=reason):
            use(content)
    with pytest.raises(UserError, match=f"Row r, column image: .*{reason}"):
        trained_on(content, "full")


def test_bounds_are_ours_and_not_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = kinds.saved(kinds.RGB, "PNG")
    (tmp_path / "a.png").write_bytes(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some of vLLM's modules do
    monkeypatch.setattr(images, "MAX_PIXELS", kinds.WIDTH * kinds.HEIGHT - 1)
    with pytest.raises(images.ImageTooLargeError, match="24 x 18 pixels, more than 431"):
        images.decode(content)
    monkeypatch.setattr(images, "MAX_BYTES", len(content) - 1)
    for source in (content, tmp_path / "a.png"):
        with pytest.raises(images.ImageTooLargeError, match=f"has {len(content)} bytes"):
            images.decode(source)
    with pytest.raises(images.ImageTooLargeError, match=f"has {len(content)} bytes"):
        images.read(tmp_path / "a.png")


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "is not a file"), (tmp_path / "no.png", "No such file")):
        for use in (images.decode, images.read):
            with pytest.raises(images.PictureError, match=reason):
                use(path)
    with pytest.raises(images.PictureError, match="is not a file"):
        images.read(Path("/dev/zero"))


def test_orientation_that_cannot_be_read_counts_as_upright() -> None:
    data = b"Exif\0\0II*\0\xff\xff\xff\xffnonsense"
    content = kinds.saved(kinds.RGB, "PNG", exif=data)
    assert np.array_equal(np.asarray(images.decode(content)), kinds.RGB)


def test_a_size_costs_no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Any) -> None:
        raise AssertionError("decoded")

    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for kind in ("RGB PNG", "JPEG, orientation 6", "PNG, orientation 6", "WebP, orientation 6"):
        content, expected = kinds.KINDS[kind]
        with images.open_picture(content) as picture:
            assert picture.size == (expected.shape[1], expected.shape[0])


# ---- an evaluation with bad pictures --------------------------------------------------------------------------------


def rewritten(published: Path, data: Path, name: str, spoil: Callable[[int, bytes], Any]) -> None:
    """A copy of a benchmark whose pictures are spoilt; 30 rows of vstar, all rows of others."""
    import datasets

    file = next((published / name / "data").glob("*.parquet"))
    table = datasets.Dataset.from_parquet(str(file)).cast_column("image", datasets.Image(decode=False))
    rows = table.to_list()
    if name == "vstar":
        rows = [rows[i % len(rows)] | {"question_id": str(i)} for i in range(30)]
    for i, row in enumerate(rows):
        row["image"] = {"bytes": spoil(i, row["image"]["bytes"]), "path": None}
    target = data / name / "data" / file.name
    target.parent.mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(str(target))


def test_bad_pictures_are_questions_without_an_answer(
    published: Path, stub: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """25 in a row: more than failures after which a server counts as gone."""
    spoils = [kinds.BROKEN[k][0] for k in ("empty", "a web page", "JPEG cut short", "bomb", "TIFF")]
    rewritten(published, tmp_path / "data", "vstar", lambda i, good: spoils[i % 5] if i < 25 else good)
    server = stub(lambda body: {"text": "Answer: A"})
    overrides = ["model=stub", "benchmarks=[vstar]", f"endpoint={server.url}", f"data={tmp_path / 'data'}"]
    assert evaluate.main([*overrides, f"out={tmp_path}", "concurrency=1"]) == 1
    said = capsys.readouterr().out
    assert "vstar/0/full: its picture is not there: column image holds neither" in said
    assert "vstar/1/full: its picture is not a readable image" in said
    assert "vstar/2/full: its picture is not a whole image" in said
    assert "25 questions got no answer" in said
    records = read_records(tmp_path / "stub" / "vstar" / "records.jsonl").records
    assert [r.id for r in records] == [str(i) for i in range(25, 30)] and len(server.asked) == 5


def test_a_missing_picture_does_not_keep_a_clustered_benchmark_from_loading(
    published: Path, tmp_path: Path
) -> None:
    import datasets

    table = datasets.Dataset.from_parquet(str(published / "hrbench_4k" / "hr_bench_4k.parquet"))
    rows = [row | ({"image": None} if i < 2 else {}) for i, row in enumerate(table.to_list())]
    (tmp_path / "hrbench_4k").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "hrbench_4k" / "hr_bench_4k.parquet"))
    questions = benchmark.load("hrbench_4k", tmp_path)
    clusters = [q.cluster for q in questions.questions]
    assert len(set(clusters)) == 4 and clusters[2] == clusters[3] != clusters[4] == clusters[7]
    with pytest.raises(images.PictureError, match="is not there"):
        questions.picture(questions.questions[0], "full")
