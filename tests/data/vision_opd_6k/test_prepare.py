"""From a folder in the published layout to validated splits: contents, held-out rows, resuming, and what is refused."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image

from data import near_duplicates, schema, validation_stamp
from data.vision_opd_6k import prepare, source
from vopd.backbone.dataset import TripletDataset
from vopd.backbone.rollout import decode
from vopd.errors import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
ROWS = 40
CHOICES = {"validation": 6, "test": 6, "seed": 0}
Spoil = Callable[[int, dict], dict]


@pytest.fixture(scope="session")
def published(layout: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layout.build(tmp_path_factory.mktemp("published") / "set", ROWS)


@pytest.fixture(scope="session")
def prepared(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder, for reading only."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare.prepare(out, published, choices=CHOICES)
    return out


def rows_of(out: Path) -> dict[str, list[dict[str, Any]]]:
    return {split: list(schema.rows(out / f"{split}.parquet")) for split in prepare.SPLITS}


def test_every_row_arrives_as_published(prepared: Path, published: Path) -> None:
    lines = [json.loads(line) for line in (published / "train.jsonl").read_text().splitlines()]
    rows = {row["id"]: row for split in rows_of(prepared).values() for row in split}
    assert len(rows) == ROWS
    for number, line in enumerate(lines):
        row = rows[f"vision-opd-6k-{number:06d}"]
        assert row["question"] == line["problem"].removeprefix("<image>\n")
        assert (
            row["hint"] in row["question"] and row["answer"] == line["answer"] and row["box"] == line["bbox"]
        )
        listed = [part.split(". ")[1] for part in line["problem"].split("\n")[5:9]]
        assert row["options"] == listed
        assert (
            row["image"] == {"bytes": None, "path": f"images/{line['images'][0]}"} and row["original"] is None
        )
        assert row["provenance"].endswith(f"train.jsonl line {number + 1}")


def test_held_out_rows_share_no_image_with_others(prepared: Path) -> None:
    rows = rows_of(prepared)
    assert {split: len(r) for split, r in rows.items()} == {"train": 28, "validation": 6, "test": 6}
    assert all(row["split"] == split for split, r in rows.items() for row in r)
    hashes, splits = [], []
    for split, of_split in rows.items():
        for row in of_split:
            picture = schema.decode_image(row["image"], prepared)
            hashes.append(near_duplicates.perceptual_hash(picture))
            splits.append(split)
    groups = near_duplicates.groups(np.array(hashes, dtype=np.uint64)).tolist()
    assert len(set(groups)) == ROWS - ROWS // 5  # every fifth row asks about the image before it
    assert len(set(zip(groups, splits, strict=True))) == len(set(groups))


def test_it_is_validated_and_trains_from_anywhere(prepared: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(prepared, tmp_path / "moved")
    assert set(validation_stamp.check(moved, prepare.SPLITS)) == set(prepare.SPLITS)
    shutil.rmtree(moved / "work")
    data = TripletDataset(str(moved / "train.parquet"), None, None)
    row = decode(data[3]["row"])
    assert min(row["image"].size) >= 300 and row["crop"].mode == "RGB"
    (moved / data.rows[3]["image"]["path"]).write_bytes(b"other")
    with pytest.raises(UserError, match="not the one that was validated"):
        validation_stamp.check(moved, prepare.SPLITS)


def test_archives_may_leave_the_folders_name_out(layout: ModuleType, tmp_path: Path) -> None:
    published = layout.build(tmp_path / "set", 30, parts=1, bare=True)
    prepare.prepare(tmp_path / "out", published, choices=CHOICES)
    assert next(schema.rows(tmp_path / "out" / "train.parquet"))["image"]["path"].startswith("images/0000")


def files_below(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.read_bytes())
        for f in folder.rglob("*")
        if f.is_file()
    }


def test_again_does_nothing_and_needs_no_source(prepared: Path) -> None:
    before = files_below(prepared)
    meta = prepare.prepare(prepared)
    assert meta["rows"] == {"train": 28, "validation": 6, "test": 6} and meta["quarantined"] == 0
    assert files_below(prepared) == before


def test_another_choice_of_held_out_rows_extracts_and_reads_nothing_again(
    prepared: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(prepared, tmp_path / "out")
    monkeypatch.setattr(prepare, "extract", None)
    monkeypatch.setattr(prepare.worker_pool, "workers", None)
    monkeypatch.setattr(prepare.validate, "picture_problems", None)
    prepare.prepare(out, published, choices={"seed": 1})
    new, old = rows_of(out), rows_of(prepared)
    assert len(new["test"]) == 6 and {r["id"] for r in new["test"]} != {r["id"] for r in old["test"]}


KILLED = """
import importlib, os, sys
from pathlib import Path

from data.vision_opd_6k import prepare

out, published, owner, name, last = sys.argv[1:]
module, _, inside = owner.partition(":")
owner = importlib.import_module(module)
owner = getattr(owner, inside) if inside else owner
exact, calls = getattr(owner, name), 0

def killed(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(last):
        os.kill(os.getpid(), 9)
    return exact(*args, **kwargs)

setattr(owner, name, killed)
prepare.main(["--out", out, "--source", published, "--validation-rows=6", "--test-rows=6"])
"""
KILLS = {
    "in the first archive": ("data.vision_opd_6k.archive", "_write", 9),
    "in the second archive": ("data.vision_opd_6k.archive", "_write", ROWS + 9),
    "between rows": ("data.vision_opd_6k.prepare:_Work", "_check_share", 25),
    "before the second split": ("data.schema", "write", 2),
    "in the last validation": ("data.validate", "row_problems", 30),
    "before the record": ("vopd.common.ownership:Owned", "write_text", 1),
}
"""The call that does not return, of a function by its module (and class)."""


def marked(journal: Path, line: int) -> None:
    """Marks a line of the journal, which shows later whether it was kept."""
    lines = journal.read_text().splitlines()
    lines[line] = json.dumps(json.loads(lines[line]) | {"marked": True})
    journal.write_text("\n".join(lines) + "\n")


def marks(journal: Path) -> list[int]:
    return [i for i, line in enumerate(journal.read_text().splitlines()) if "marked" in json.loads(line)]


def test_killed_again_and_again_it_resumes_and_ends_with_the_same_bytes(
    prepared: Path, published: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    journal = out / "work" / "rows.jsonl"
    for where, (owner, name, call) in KILLS.items():
        arguments = [str(out), str(published), owner, name, str(call)]
        process = subprocess.run(
            [sys.executable, "-P", "-c", KILLED, *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.returncode == -signal.SIGKILL, (where, process.stderr.decode())
        assert not (out / "meta.json").exists()
        if where == "between rows":
            assert len(journal.read_text().splitlines()) == 24  # the first call comes before the first row
            marked(journal, 22)
            journal.write_bytes(journal.read_bytes()[:-7])
    prepare.prepare(out, published, choices=CHOICES)
    assert marks(journal) == [22]  # what was read before the kill was not read again
    assert contents(out) == contents(prepared)


def contents(out: Path) -> dict[str, bytes]:
    """What a prepared folder holds, but for the notes of its making."""
    files = (f for f in out.rglob("*") if f.is_file() and not f.name.startswith("."))
    return {str(f.relative_to(out)): f.read_bytes() for f in files if f.parent.name != "work"}


def test_a_row_is_kept_only_while_its_pictures_are_the_same(
    prepared: Path, published: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(prepared, tmp_path / "out")  # other files, of the same content
    journal = out / "work" / "rows.jsonl"
    for line in (6, 7, 8):
        marked(journal, line)
    picture = out / json.loads(journal.read_text().splitlines()[7])["row"]["image"]["path"]
    times = picture.stat().st_atime_ns, picture.stat().st_mtime_ns
    picture.write_bytes(b"x" * picture.stat().st_size)
    os.utime(picture, ns=times)
    (out / "meta.json").unlink()
    meta = prepare.prepare(out, published, choices=CHOICES, most_failed=0.05)
    assert marks(journal) == [6] and meta["quarantined"] == 1
    (line,) = [json.loads(line) for line in (out / "quarantined.jsonl").read_text().splitlines()]
    assert line["line"] == 8 and "not a readable image" in line["reason"]


def test_the_last_validation_sees_a_picture_that_changed_on_the_way(
    prepared: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(prepared, tmp_path / "out")
    exact = schema.write

    def written(*args: Any, **kwargs: Any) -> int:
        (out / "images" / "images" / "000003.png").write_bytes(b"x")
        return exact(*args, **kwargs)

    monkeypatch.setattr(schema, "write", written)
    with pytest.raises(UserError, match="some rows did not pass"):
        prepare.prepare(out, published, choices={"seed": 1})
    assert not (out / validation_stamp.NAME).exists()


@pytest.mark.parametrize("name", ["train.jsonl", "images/images.tar.gz01"])
def test_other_files_later_are_an_error(prepared: Path, published: Path, tmp_path: Path, name: str) -> None:
    other = shutil.copytree(published, tmp_path / "other")
    (other / name).write_bytes((other / name).read_bytes() + b"\n")
    with pytest.raises(UserError, match=f"{name}: not the file that .* was begun with"):
        prepare.prepare(shutil.copytree(prepared, tmp_path / "out"), other)


@pytest.mark.parametrize("name", ["train.jsonl", "images", "teacher_images/teacher_images.tar.gz"])
def test_a_missing_file_is_named(published: Path, tmp_path: Path, name: str) -> None:
    other = shutil.copytree(published, tmp_path / "other")
    (shutil.rmtree if (other / name).is_dir() else Path.unlink)(other / name)
    with pytest.raises(UserError, match=name):
        prepare.prepare(tmp_path / "out", other)


# ---- originals -----------------------------------------------------------------------------------------------------


def test_originals_are_taken_where_they_are_there(layout: ModuleType, tmp_path: Path) -> None:
    published = layout.build(
        tmp_path / "set", 30, originals=True,
        change=lambda i, row: row | {"original_images": ["original_images/none.png"]} if i == 3 else row,
    )  # fmt: skip
    prepare.prepare(tmp_path / "out", published, choices=CHOICES)
    rows = {row["id"]: row for split in rows_of(tmp_path / "out").values() for row in split}
    without = [id_ for id_, row in rows.items() if row["original"] is None]
    assert len(rows) == 30 and without == ["vision-opd-6k-000003"]
    row = rows["vision-opd-6k-000002"]
    original = schema.decode_image(row["original"], tmp_path / "out")
    assert original.tobytes() == layout.published_row(2)[1]["original_images"].tobytes()


# ---- rows that fail ------------------------------------------------------------------------------------------------

BAD: dict[str, Callable[[dict], Any]] = {
    "no options A, B": lambda row: row | {"problem": "<image>What? Look at the red box."},
    "is not a letter": lambda row: row | {"answer": "the red one"},
    "answer is not a text": lambda row: {k: v for k, v in row.items() if k != "answer"},
    "is not in the archive": lambda row: row | {"images": ["images/none.png"]},
    "absolute path": lambda row: row | {"images": ["../train.jsonl"]},
    "teacher_images is not a list of one path": lambda row: row | {"teacher_images": []},
    "four numbers": lambda row: row | {"bbox": [1, 2, 3]},
    "not inside the image": lambda row: row | {"bbox": [5, 5, 9000, 90]},
    "bbox, widened and enlarged as published, has": lambda row: row | {"bbox": [5, 5, 90, 90]},
    "not a JSON object": lambda row: ["no", "object"],
    "surrogates not allowed": lambda row: row | {"problem": row["problem"].replace("thing", "\ud800")},
    "the crop has": lambda row: row | {"teacher_images": ["teacher_images/000000.png"]},
}  # fmt: skip
PICTURES: dict[str, Callable[[dict], dict]] = {
    "no red frame around bbox in the image": lambda shown: shown | {"images": shown["original_images"]},
    "crop: fits nowhere near": lambda shown: shown | {
        "teacher_images": shown["teacher_images"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)},
    "size: original is": lambda shown: shown | {"original_images": shown["teacher_images"]},
}  # fmt: skip


def spoiled(layout: ModuleType, folder: Path, rows: int) -> dict[str, str]:
    """A published set in which one or two of every five rows are bad; reasons by id."""
    texts = dict(zip(range(1, rows, 5), BAD.values(), strict=False))
    shown = dict(zip(range(3, rows, 5), PICTURES.values(), strict=False))
    layout.build(
        folder, rows, originals=True,
        change=lambda i, row: texts[i](row) if i in texts else row,
        pictures=lambda i, pictures: shown[i](pictures) if i in shown else pictures,
    )  # fmt: skip
    expected = dict(zip(texts, BAD, strict=True)) | dict(zip(shown, PICTURES, strict=False))
    return {f"vision-opd-6k-{number:06d}": expected[number] for number in sorted(expected)}


def test_rows_that_fail_are_quarantined_by_row_and_the_rest_is_converted(
    layout: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = 5 * len(BAD)
    expected = spoiled(layout, tmp_path / "set", count)
    out, given = tmp_path / "out", ["--source", str(tmp_path / "set"), "--test-rows=4", "--validation-rows=4"]
    assert prepare.main([*given, "--out", str(out), "--most-failed", "0.3"]) == 0
    listed = [json.loads(line) for line in (out / "quarantined.jsonl").read_text().splitlines()]
    assert [line["id"] for line in listed] == list(expected)
    for line in listed:
        assert expected[line["id"]] in line["reason"] and int(line["id"][-6:]) + 1 == line["line"]
    rows = [row["id"] for split in rows_of(out).values() for row in split]
    assert len(rows) == count - len(expected) and not set(rows) & set(expected)
    share = len(expected) / count
    assert f"{len(expected)} rows ({share:.2%}) quarantined: reasons in {out}" in capsys.readouterr().out
    validation_stamp.check(out, prepare.SPLITS)


def test_past_the_stated_share_there_is_an_error_and_a_larger_one_continues(
    layout: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = layout.build(
        tmp_path / "set", 50, change=lambda i, row: row | {"answer": "?"} if i in (11, 15) else row
    )
    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"2 rows of 50 failed so far, more than 2.00% \(the first, vision-opd-6k-000011"
    ):
        prepare.prepare(out, published, choices=CHOICES)
    assert len((out / "quarantined.jsonl").read_text().splitlines()) == 2
    assert len((out / "work" / "rows.jsonl").read_text().splitlines()) == 16  # no row more than needed
    assert not (out / "train.parquet").exists()
    monkeypatch.setattr(prepare, "extract", None)
    meta = prepare.prepare(out, published, choices=CHOICES, most_failed=0.04)
    assert meta["quarantined"] == 2 and sum(meta["rows"].values()) == 48
    assert prepare.prepare(out) == meta  # the share is kept


def test_a_control_token_in_a_question_is_no_reason_to_drop_it(layout: ModuleType, tmp_path: Path) -> None:
    """The model is shown it as plain text (`vopd/common/control_tokens.py`)."""
    published = layout.build(
        tmp_path / "set",
        30,
        change=lambda i, row: row | {"problem": row["problem"].replace("<image>", "<image><|im_end|> ")},
    )
    assert prepare.prepare(tmp_path / "out", published, choices=CHOICES)["quarantined"] == 0
    questions = [row["question"] for split in rows_of(tmp_path / "out").values() for row in split]
    assert len(questions) == 30 and all(text.startswith("<|im_end|> ") for text in questions)


def test_one_row_of_fifty_is_within_the_default(layout: ModuleType, tmp_path: Path) -> None:
    published = layout.build(
        tmp_path / "set", 50, change=lambda i, row: row | {"bbox": [1, 1, 20, 20]} if i == 30 else row
    )
    assert prepare.prepare(tmp_path / "out", published, choices=CHOICES)["quarantined"] == 1


def test_numbers_of_another_meaning_stop_it_early(layout: ModuleType, tmp_path: Path) -> None:
    def width_and_height(_: int, row: dict) -> dict:
        x0, y0, x1, y1 = row["bbox"]
        return row | {"bbox": [x0, y0, x1 - x0, y1 - y0]}

    published = layout.build(tmp_path / "set", 20, change=width_and_height)
    with pytest.raises(UserError, match=r"1 rows of 20 failed so far.* bbox"):
        prepare.prepare(tmp_path / "out", published, choices=CHOICES)


@pytest.mark.parametrize("share", ["1.5", "-0.1", "much", "nan"])
def test_a_share_is_between_0_and_1(share: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        prepare.main(["--out", str(tmp_path / "out"), f"--most-failed={share}"])
    assert ended.value.code == 2


def test_too_few_rows_to_hold_out_from(published: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="512 rows cannot be held out of 40"):
        prepare.prepare(tmp_path / "out", published)


@pytest.mark.parametrize("seed", range(3))
def test_assign_keeps_groups_together_and_bounds(seed: int) -> None:
    hashes = np.repeat(np.random.default_rng(seed).integers(0, 2**63, 30, dtype=np.uint64), 3)
    splits = prepare.assign(hashes, {"test": 10, "validation": 6}, seed)
    assert (splits.count("test"), splits.count("validation")) == (9, 6)
    assert all(len(set(splits[i : i + 3])) == 1 for i in range(0, 90, 3))
    assert splits == prepare.assign(hashes, {"test": 10, "validation": 6}, seed)


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(published: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for huggingface_hub: `hub.sha` is the newest revision, `hub.asked` what was downloaded."""
    fake = SimpleNamespace(sha="a" * 40, asked=[])

    class Api:
        def dataset_info(self, repo_id: str, revision: str) -> SimpleNamespace:
            assert repo_id == source.HUB_ID
            return SimpleNamespace(sha={"main": fake.sha}.get(revision, revision))

    def snapshot_download(
        repo_id: str, repo_type: str, revision: str, allow_patterns: list, local_dir: Path
    ) -> str:
        assert (repo_id, repo_type) == (source.HUB_ID, "dataset")
        assert allow_patterns == [
            "train.jsonl",
            "images/images.tar.gz*",
            "teacher_images/teacher_images.tar.gz*",
        ]
        fake.asked.append(revision)
        return str(shutil.copytree(published, local_dir, dirs_exist_ok=True))

    monkeypatch.setattr(source, "HfApi", Api)
    monkeypatch.setattr(source, "snapshot_download", snapshot_download)
    return fake


def test_the_hubs_revision_is_pinned_recorded_and_checked(hub: SimpleNamespace, tmp_path: Path) -> None:
    out, pinned = tmp_path / "out", source.REVISION
    meta = prepare.prepare(out, choices=CHOICES)
    assert meta["revision"] == pinned == json.loads((out / "source.json").read_text())["revision"]
    assert all(row["provenance"].startswith(pinned) for row in schema.rows(out / "train.parquet"))
    assert prepare.prepare(out) == meta and hub.asked == [pinned]
    (out / "meta.json").unlink()  # as if interrupted before the end
    assert prepare.prepare(out, choices=CHOICES) == meta
    with pytest.raises(UserError, match=f"begun with revision {pinned}.*main is {'a' * 40}; give --revision"):
        prepare.prepare(out, revision="main", choices=CHOICES)
    assert hub.asked == [pinned, pinned]
    source.fetch(tmp_path / "other", "main")
    source.fetch(tmp_path / "other", None)
    assert hub.asked[2:] == ["a" * 40] * 2  # what a folder was begun with stays


def test_files_that_are_not_the_pinned_ones_are_said(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    source.check_unchanged(tmp_path / "out", published)
    assert "train.jsonl: not the file of revision eb5c1c2e" in capsys.readouterr().err
    digest = hashlib.sha256((published / "train.jsonl").read_bytes()).hexdigest()
    monkeypatch.setattr(source, "ROWS_SHA256", digest)
    source.check_unchanged(tmp_path / "out", published)
    assert "not the file" not in capsys.readouterr().err


def test_without_a_network_there_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(["--out", str(tmp_path / "out")]) == 2  # the tests run with the hub switched off
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "could not be fetched" in said and "--source" in said


def test_a_folder_made_locally_does_not_ask_the_hub(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise OfflineModeIsEnabled("asked")

    monkeypatch.setattr(source, "HfApi", never)
    out = shutil.copytree(prepared, tmp_path / "out")
    (out / "meta.json").unlink()
    with pytest.raises(UserError, match="made from a local folder; give that folder as --source"):
        prepare.prepare(out)


def test_command_line(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--source",
        str(published),
        "--out",
        str(tmp_path / "out"),
        "--validation-rows",
        "5",
        "--test-rows",
        "7",
    ]
    assert prepare.main(arguments) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("train 28, validation 5, test 7 rows; bbox is x0, y0, x1, y1 in pixels")
