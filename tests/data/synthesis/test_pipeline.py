"""The pipeline on photographs against a stand-in server: rows, resume, faults, kills, and every stage's own rule."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data import audit, schema, synthesize, validate
from data.synthesis import config, pipeline, prompts, proposers
from vopd.common import fingerprint, ownership
from vopd.config import ROOT
from vopd.errors import UserError

pytestmark = pytest.mark.slow

Overrides = Callable[..., list[str]]


def records(out: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "stages" / f"{stage}.jsonl").read_text().splitlines()]


def reasons(out: Path, stage: str) -> Counter[str]:
    return Counter(record["reason"] for record in records(out, stage) if record["reason"])


def rows(out: Path) -> list[dict[str, Any]]:
    return list(schema.rows(out / "train.parquet"))


@pytest.fixture(scope="module")
def whole(
    stub_server: ModuleType, overrides_in: Overrides, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """The folder of an uninterrupted run, and how many requests it sent."""
    out = tmp_path_factory.mktemp("whole")
    with stub_server.StubServer() as stub:
        assert synthesize.main(overrides_in(out, stub.url, "server.price_in=2", "server.price_out=30")) == 0
        return out, len(stub.bodies)


def test_nothing_is_done_twice(
    stub_server: ModuleType, overrides_in: Overrides, whole: tuple[Path, int]
) -> None:
    out, _ = whole
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.jp*g")}
    rows_before, stages = (
        (out / "train.parquet").read_bytes(),
        {f: f.read_bytes() for f in (out / "stages").iterdir()},
    )
    with stub_server.StubServer() as stub:
        assert synthesize.main(overrides_in(out, stub.url, "server.price_in=2", "server.price_out=30")) == 0
        assert stub.bodies == []
    assert (out / "train.parquet").read_bytes() == rows_before
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.jp*g")} == before
    assert {file: file.read_bytes() for file in (out / "stages").iterdir()} == stages


def test_photographs_become_valid_rows(whole: tuple[Path, int]) -> None:
    out, _ = whole
    assert validate.main([str(out)]) == 0
    made = schema.read(out / "train.parquet")
    assert len(made) >= 2 and len({row["id"] for row in made}) == len(made)
    for row in made:
        x0, y0, x1, y1 = row["box"]
        image, original, crop = (np.asarray(row[c].convert("RGB")).astype(int) for c in schema.ALL_IMAGES)
        assert (x1 - x0) * (y1 - y0) < 0.1 * image.shape[0] * image.shape[1]
        assert crop.shape[:2] == (2 * (y1 - y0), 2 * (x1 - x0))
        region = original[y0:y1, x0:x1].astype(np.uint8)
        assert audit.correlation(crop.astype(np.uint8), region) > 0.9
        assert abs(image - original)[y0 + 8 : y1 - 8, x0 + 8 : x1 - 8].mean() < 4  # the frame lies outside
        assert row["question"].endswith(row["hint"])
        assert row["options"]["ABCD".index(row["answer"])] in ("red", "green", "blue")
        assert all(
            f"{letter}) {o}\n" in row["question"] for letter, o in zip("ABCD", row["options"], strict=True)
        )
        assert (row["source"], row["split"]) == ("sample photographs", "train") and "stub" in row[
            "provenance"
        ]


def test_counts_of_stages_and_datasheet_add_up(whole: tuple[Path, int]) -> None:
    out, asked = whole
    assert reasons(out, "scan") == {"not a usable image": 1}
    assert (
        len(records(out, "scan")) == 5 and len(records(out, "propose")) == 3
    )  # one photograph is there twice
    agreed = [r for r in records(out, "consensus") if r["reason"] is None]
    assert len(records(out, "answer")) == 4 * sum(r["reason"] is None for r in records(out, "validate"))
    assert reasons(out, "consensus")["no consensus"] >= 1  # the stub's numbers differ with the seed
    assert len(records(out, "options")) == len(agreed)
    sheet = (out / "datasheet.md").read_text()
    lines = {name: cells.split(" | ") for name, cells in re.findall(r"^\| (\w+) \| (.*) \|$", sheet, re.M)}
    asking = ("ask", "validate", "answer", "options")
    used = sum(record["tokens"][0] for stage in asking for record in records(out, stage))
    assert used == 100 * asked == sum(int(cells[4]) for name, cells in lines.items() if name != "stage")
    cost = float(lines["answer"][-1])
    assert cost == pytest.approx(len(records(out, "answer")) * (100 * 2 + 10 * 30) / 1e6, abs=1e-4)
    assert lines["row"][1] == str(len(rows(out))) and "see the packages" in sheet


def test_rows_do_not_depend_on_concurrency(
    stub_server: ModuleType, overrides_for: Overrides, tmp_path: Path
) -> None:
    found = []
    for concurrency in (1, 8):
        out = tmp_path / str(concurrency)
        with stub_server.StubServer(delay_s=0.002) as stub:
            overrides = overrides_for(
                stub.url, f"out={out}", f"server.concurrency={concurrency}", "transforms.overlay=0.5"
            )
            assert synthesize.main(overrides) == 0
        found.append(rows(out))
    assert found[0] == found[1] and len(found[0]) >= 2


def test_every_fault_ends_as_a_retry_or_a_reason(
    stub_server: ModuleType, overrides_for: Overrides, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    kinds = (
        "busy",
        "no_json",
        "broken",
        "refusal",
        "half_closed",
        "sorry",
        "silent",
        "cut_off",
        "no_protocol",
    )
    with stub_server.StubServer(faults=dict(enumerate(kinds))) as stub:
        overrides = overrides_for(
            stub.url, "server.concurrency=1", "server.timeout_s=1", "propose.per_image=2"
        )
        assert synthesize.main(overrides) == 1
        # Six crops: the faults all fall on the stage that asks.
        assert reasons(out, "ask") == {
            "reply is not the JSON asked for": 1,
            "the model refused": 2,
            "reply cut off at max_tokens": 1,
        }
        assert len(records(out, "ask")) == 5
        assert synthesize.main(overrides) == 0  # what was no reply at all is asked again
    assert len(records(out, "ask")) == 6
    assert len({r["id"].rsplit("-", 1)[0] for r in rows(out)}) == 2


def test_json_of_another_shape_is_a_reason_at_every_stage(
    stub_server: ModuleType, overrides_for: Overrides, tmp_path: Path
) -> None:
    wrong = '{"questions": "none", "valid": "perhaps", "distractors": [1]}'
    for stage, mark in (("ask", '"questions"'), ("validate", '"valid"'), ("options", '"distractors"')):
        out = tmp_path / stage

        def reply(image: Image.Image, text: str, seed: int, mark: str = mark) -> str:
            return wrong if mark in text else str(stub_server.answer(image, text, seed))

        with stub_server.StubServer(reply=reply) as stub:
            assert synthesize.main(overrides_for(stub.url, f"out={out}")) == 0
        assert set(reasons(out, stage)) == {"reply is not the JSON asked for"}
        assert not (out / "train.parquet").exists() and (out / "datasheet.md").exists()


@pytest.mark.parametrize(
    "distractors",
    [["teal", "Teal.", "beige"], ["violet", "teal"], ["red", "green", "blue"], ["a", "b", "c", "d"]],
)
def test_options_that_are_not_three_and_distinct_are_rejected(
    stub_server: ModuleType, overrides_for: Overrides, tmp_path: Path, distractors: list[str]
) -> None:
    def reply(image: Image.Image, text: str, seed: int) -> str:
        if '"distractors"' in text:
            return json.dumps({"distractors": distractors})
        return str(stub_server.answer(image, text, seed))

    with stub_server.StubServer(reply=reply) as stub:
        assert synthesize.main(overrides_for(stub.url)) == 0
    assert set(reasons(tmp_path / "out", "options")) == {"options not three or not distinct"}


def test_a_killed_run_loses_only_what_was_in_flight(
    stub_server: ModuleType, overrides_for: Overrides, whole: tuple[Path, int], tmp_path: Path
) -> None:
    out, needed = whole
    with stub_server.StubServer(delay_s=0.03) as stub:
        overrides = overrides_for(stub.url, "server.concurrency=4")
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vopd", "data", "synthesize", *overrides],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
        )
        while len(stub.bodies) < needed // 2 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with (tmp_path / "out" / "stages" / "answer.jsonl").open("ab") as file:
            file.write(b'{"id": "torn')
        assert synthesize.main(overrides) == 0
        assert needed <= len(stub.bodies) <= needed + 4
    assert rows(tmp_path / "out") == rows(out)


def test_unanswered_requests_end_in_exit_code_1_and_a_second_start_completes(
    stub_server: ModuleType, overrides_for: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with stub_server.StubServer(faults={2: "broken"}) as stub:
        overrides = overrides_for(stub.url, "server.concurrency=1", "server.tries=1")
        assert synthesize.main(overrides) == 1
        assert "stayed unanswered" in capsys.readouterr().err
        first = {row["id"] for row in rows(tmp_path / "out")}
        assert synthesize.main(overrides) == 0
    assert first < {row["id"] for row in rows(tmp_path / "out")}


def test_a_folder_belongs_to_one_run_and_its_settings(
    overrides_for: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = overrides_for("http://127.0.0.1:9/v1")
    with pipeline.Pipeline(config.load(overrides)):
        assert synthesize.main(overrides) == 2
        assert "another process is writing here" in capsys.readouterr().err
    assert synthesize.main([*overrides, "crop.enlarge=3"]) == 2
    assert "another crop.enlarge" in capsys.readouterr().err


def test_results_of_other_code_or_of_a_changed_image_are_not_gone_on_with(
    stub_server: ModuleType, overrides_for: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "own", tmp_path / "out"
    folder.mkdir()
    Image.new("RGB", (400, 400)).save(folder / "blank.png")
    with stub_server.StubServer() as stub:
        overrides = overrides_for(stub.url, f"images={folder}")
        assert synthesize.main(overrides) == 0 == synthesize.main(overrides)
        recorded = fingerprint.read(out)
        assert recorded and "code data/synthesis/prompts.py" in recorded
        fingerprint.write(out, {**recorded, "code data/synthesis/prompts.py": "edited"})
        assert synthesize.main(overrides) == 2
        assert "a synthesis with another code data/synthesis/prompts.py" in capsys.readouterr().err
        (out / fingerprint.FILE).unlink()  # the way on that the sentence names
        assert synthesize.main(overrides) == 0
        Image.new("RGB", (400, 400), "red").save(folder / "blank.png")
        assert synthesize.main(overrides) == 2
        assert "blank.png: was changed since it was scanned" in capsys.readouterr().err


@pytest.mark.parametrize("images", ["absent", "empty"])
def test_a_folder_without_images_is_a_sentence(tmp_path: Path, overrides_for: Overrides, images: str) -> None:
    (tmp_path / "empty").mkdir()
    assert synthesize.main(overrides_for("http://127.0.0.1:9/v1", f"images={tmp_path / images}")) == 2


def test_a_small_model_that_is_right_too_often_drops_the_row(
    stub_server: ModuleType, overrides_for: Overrides, tmp_path: Path
) -> None:
    def reply(image: Image.Image, text: str, seed: int) -> str:
        if not re.search(r"^A\) ", text, re.M):
            return str(stub_server.answer(image, text, seed))
        if "darkest" in text:
            return "I'm not sure."  # never right
        return next(f"{m[1]}" for m in re.finditer(r"^([A-D])\) (\w+)$", text, re.M) if m[2] in COLOURS)

    with stub_server.StubServer(reply=reply) as stub:
        assert synthesize.main(overrides_for(stub.url, "difficulty.model=small")) == 0
        tries = [body for body in stub.bodies if body["model"] == "small"]
    made = rows(tmp_path / "out")
    assert made and all("darkest" in row["question"] for row in made)
    assert reasons(tmp_path / "out", "hard")["too easy"] == len(tries) / 4 - len(made) > 0


COLOURS = ("red", "green", "blue")


def test_a_detector_is_told_what_the_model_listed(
    stub_server: ModuleType, overrides_for: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def propose(image: Image.Image, labels: list[str]) -> list[proposers.Region]:
        told.append(labels)
        windows = [proposers.Region((x, 50, x + 60, 110), 0.9, "window") for x in (10, 90)]
        return [*windows, proposers.Region((170, 50, 230, 110), 0.8, "sign")]

    monkeypatch.setattr(proposers, "build", lambda *_: proposers.Proposer(propose, needs_labels=True))
    with stub_server.StubServer() as stub:
        assert synthesize.main(overrides_for(stub.url)) == 0
    assert told == [["sign", "window"]] * 3
    against = Counter()
    for record in records(tmp_path / "out", "filter"):
        against.update(record["against"])
    assert against == {"not the only one of its kind": 6}
    assert {tuple(row["box"]) for row in rows(tmp_path / "out")} == {(170, 50, 230, 110)}


def test_unusable_images_are_left_out_with_a_reason(
    stub_server: ModuleType, overrides_for: Overrides, photographs: Path, tmp_path: Path
) -> None:
    """A bomb, a cut-off file, another format under a known name, a small one; what was made before is not read."""
    folder = tmp_path / "mixed"
    ownership.claim(folder / "out", pipeline.MAKER)
    (folder / "out" / "crops").mkdir()
    Image.new("1", (9000, 9000)).save(folder / "bomb.png")
    whole = (photographs / "rocket.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (400, 400)).save(folder / "other.png", "TIFF")
    Image.new("RGB", (400, 200)).save(folder / "small.png")
    Image.new("RGB", (400, 400)).save(folder / "blank.png")
    (folder / "out" / "crops" / "made.jpg").write_bytes(whole)
    with stub_server.StubServer() as stub:
        assert synthesize.main(overrides_for(stub.url, f"images={folder}", f"out={folder / 'out'}")) == 0
        assert stub.bodies == []
    scanned = {r["id"]: r["reason"] for r in records(folder / "out", "scan")}
    assert scanned == {
        **dict.fromkeys(("bomb.png", "cut.jpg", "other.png"), "not a usable image"),
        "small.png": "image too small",
        "blank.png": None,
    }
    assert reasons(folder / "out", "propose") == {"no region found": 1}
    assert not (folder / "out" / "train.parquet").exists()


def test_pictures_are_turned_upright_once(
    stub_server: ModuleType, overrides_for: Overrides, photographs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "turned"
    folder.mkdir()
    with Image.open(
        next(iter(sorted(Path(overrides_for("x")[0].removeprefix("images=")).glob("coffee.png"))))
    ) as coffee:
        exif = Image.Exif()
        exif[0x0112] = 6
        coffee.rotate(90, expand=True).save(folder / "turned.jpg", exif=exif, quality=95)
        coffee.convert("RGBA").save(folder / "layered.png")
        coffee.convert("L").save(folder / "grey.png")
        grey = np.asarray(coffee.convert("L"))
        Image.fromarray(grey.astype(np.uint16) * 256).save(folder / "sixteen_bits.png")
        expected = np.asarray(coffee).astype(int)
    with stub_server.StubServer() as stub:
        assert synthesize.main(overrides_for(stub.url, f"images={folder}")) == 0
    scanned = {r["id"]: r for r in records(tmp_path / "out", "scan")}
    for name, record in scanned.items():
        with Image.open(tmp_path / "out" / record["original"]) as kept:
            assert list(kept.size) == record["size"] == [600, 400], name
            assert kept.getexif().get(0x0112, 1) == 1 and kept.mode in ("RGB", "L")
            if name == "sixteen_bits.png":
                assert np.array_equal(np.asarray(kept.convert("L")), grey)
            if name == "turned.jpg":
                assert abs(np.asarray(kept).astype(int) - expected).mean() < 5


@given(
    answers=st.lists(
        st.sampled_from(["red", "Red.", "the red", "blue", "five", "5", None]), min_size=1, max_size=8
    )
)
def test_most_common_counts_equal_answers(answers: list[str | None]) -> None:
    meaning = {"red": "red", "Red.": "red", "the red": "red", "blue": "blue", "five": "5", "5": "5"}
    counts = Counter(meaning[a] for a in answers if a is not None)
    best, votes = pipeline.most_common(answers)
    assert votes == max(counts.values(), default=0)
    assert best is None if not counts else counts[meaning[str(best)]] == votes


@pytest.mark.parametrize(("right", "agreed"), [(6, True), (5, False)])
def test_consensus_is_over_all_samples(
    stub_server: ModuleType, overrides_for: Overrides, tmp_path: Path, right: int, agreed: bool
) -> None:
    """Two or three of eight answers are refusals: they count against the others."""
    said: Counter[str] = Counter()

    def reply(image: Image.Image, text: str, seed: int) -> str:
        if text.startswith("What is the colour") and prompts.answer("") in text:
            key = str(np.asarray(image.resize((8, 8))).tolist())
            said[key] += 1
            return "teal blue" if said[key] <= right else "I cannot tell."
        return str(stub_server.answer(image, text, seed))

    with stub_server.StubServer(reply=reply) as stub:
        synthesize.main(overrides_for(stub.url, "answer.samples=8"))
    found = [r for r in records(tmp_path / "out", "consensus") if r.get("right") == "teal blue"]
    assert bool(found) == agreed and all(r["votes"] == right for r in found)


@given(
    x=st.integers(0, 70),
    y=st.integers(0, 40),
    width=st.integers(8, 30),
    height=st.integers(8, 20),
    line=st.integers(1, 5),
)
def test_the_frame_surrounds_the_box_and_stays_out_of_it(
    x: int, y: int, width: int, height: int, line: int
) -> None:
    box = [x, y, min(100, x + width), min(60, y + height)]
    plain = Image.new("RGB", (100, 60), (10, 20, 30))
    framed = np.asarray(pipeline.draw_box(plain, box, 0.05, line))
    red = (framed == (255, 0, 0)).all(-1)
    assert (red | (framed == (10, 20, 30)).all(-1)).all()
    inner = 8 + line  # a frame at the picture's border may reach into the box, no further than its width
    assert red.any() and not red[box[1] + inner : box[3] - inner, box[0] + inner : box[2] - inner].any()
    if box[0] > inner and box[1] > inner and box[2] < 100 - inner and box[3] < 60 - inner:
        assert not red[box[1] : box[3], box[0] : box[2]].any()
        rows_red, columns_red = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
        assert (
            rows_red[0] < box[1]
            and rows_red[-1] >= box[3]
            and columns_red[0] < box[0]
            and columns_red[-1] >= box[2]
        )


@pytest.mark.parametrize("transform", ["overlay", "rendered_text"])
def test_transforms_replace_rows_one_for_one(
    stub_server: ModuleType, overrides_for: Overrides, whole: tuple[Path, int], tmp_path: Path, transform: str
) -> None:
    with stub_server.StubServer() as stub:
        synthesize.main(overrides_for(stub.url, f"transforms.{transform}=1.0"))
    plain, changed = rows(whole[0]), rows(tmp_path / "out")
    assert [row["id"] for row in changed] == [row["id"] for row in plain]
    assert schema.check_split(tmp_path / "out" / "train.parquet") == len(plain)
    for row, before in zip(changed, plain, strict=True):
        assert row["image"] != before["image"] and row["question"] != before["question"]
        assert row["family"].startswith("overlay: " if transform == "overlay" else "rendered text: ")


def test_help_lists_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert synthesize.main(["--help"]) == 0
    assert "consensus: 0.75" in capsys.readouterr().out


def test_bad_settings_are_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert synthesize.main(["seeed=1"]) == 2
    assert "seeed" in capsys.readouterr().err
    with pytest.raises(UserError):
        config.load(["seeed=1"])
