"""From a folder in the published layout to validated splits: contents, held-out rows, resuming, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from data import near_duplicates, schema, validation_stamp
from data.vision_opd_6k import prepare, source
from vopd.backbone.dataset import TripletDataset
from vopd.backbone.rollout import decode
from vopd.errors import UserError

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
        listed = [part.split(". ")[1] for part in line["problem"].split("\n")[2:6]]
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
    assert row["image"].size == (512, 512) and row["crop"].size == (192, 192)
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
    assert meta["rows"] == {"train": 28, "validation": 6, "test": 6} and meta["left_out"] == 0
    assert files_below(prepared) == before


def test_another_choice_of_held_out_rows_extracts_and_reads_nothing_again(
    prepared: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(prepared, tmp_path / "out")
    monkeypatch.setattr(prepare, "extract", None)
    monkeypatch.setattr(prepare, "read_question", None)
    prepare.prepare(out, published, choices={"seed": 1})
    new, old = rows_of(out), rows_of(prepared)
    assert len(new["test"]) == 6 and {r["id"] for r in new["test"]} != {r["id"] for r in old["test"]}


class Killed(BaseException):
    """What no code of ours catches, like a signal."""


@pytest.mark.parametrize("at", ["extract", "rows", "half a line", "parquet", "validate"])
def test_a_killed_run_resumes_and_ends_the_same(
    at: str, prepared: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    calls = {
        "extract": (prepare, "extract"),
        "parquet": (schema, "write"),
        "validate": (prepare.validate, "stamped"),
    }
    target, name = calls.get(at, (prepare, "read_question"))
    exact, count = getattr(target, name), 0

    def killed_on_the_way(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if at == "extract":
            return (n for i, n in enumerate(exact(*args, **kwargs)) if i < 9 or killed())
        return killed() if count > {"parquet": 1, "validate": 0}.get(at, 30) else exact(*args, **kwargs)

    def killed() -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(target, name, killed_on_the_way)
        patch.setattr(prepare, "BATCH", 8)
        with pytest.raises(Killed):
            prepare.prepare(out, published, choices=CHOICES)
    assert not (out / validation_stamp.NAME).exists() and not (out / "meta.json").exists()
    rows_file = out / "work" / "rows.jsonl"
    if at in ("rows", "half a line"):
        assert 24 <= len(rows_file.read_text().splitlines()) < ROWS
    if at == "half a line":
        rows_file.write_bytes(rows_file.read_bytes()[:-7])
    prepare.prepare(out, published, choices=CHOICES)
    assert rows_of(out) == rows_of(prepared)
    assert validation_stamp.check(out, prepare.SPLITS) == validation_stamp.check(prepared, prepare.SPLITS)


@pytest.mark.parametrize("name", ["train.jsonl", "images/images.tar.gz.part-ab"])
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


# ---- rows that cannot be read --------------------------------------------------------------------------------------

BAD: dict[str, Callable[[dict], Any]] = {
    "no options A, B": lambda row: row | {"problem": "<image>What? Look at the red box."},
    "is not a letter": lambda row: row | {"answer": "the red one"},
    "answer is not a text": lambda row: {k: v for k, v in row.items() if k != "answer"},
    "is not in the archive": lambda row: row | {"images": ["images/none.jpg"]},
    "absolute path": lambda row: row | {"images": ["../train.jsonl"]},
    "teacher_images is not a list of one path": lambda row: row | {"teacher_images": []},
    "four numbers": lambda row: row | {"bbox": [1, 2, 3]},
    "the crop is not what bbox encloses": lambda row: row | {"bbox": [5, 5, 90, 90]},
    "not inside the image": lambda row: row | {"bbox": [5, 5, 900, 900]},
    "not a JSON object": lambda row: ["no", "object"],
}


def test_rows_that_cannot_be_read_are_listed_with_their_reasons(layout: ModuleType, tmp_path: Path) -> None:
    spoilers = dict(zip(range(0, 120, 12), BAD.values(), strict=True))
    published = layout.build(
        tmp_path / "set", 120, change=lambda i, row: spoilers[i](row) if i in spoilers else row
    )
    meta = prepare.prepare(tmp_path / "out", published, choices=CHOICES)
    listed = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert meta["left_out"] == len(listed) == len(BAD)
    for (number, reason), line in zip(zip(spoilers, BAD, strict=True), listed, strict=True):
        assert line["id"] == f"vision-opd-6k-{number:06d}" and reason in line["reason"]
    assert sum(meta["rows"].values()) == 120 - len(BAD)


def test_too_many_of_them_are_an_error(layout: ModuleType, tmp_path: Path) -> None:
    published = layout.build(
        tmp_path / "set", 20, change=lambda i, row: row | {"answer": "?"} if i % 5 == 0 else row
    )
    with pytest.raises(UserError, match=r"4 of 20 rows cannot be read \(the first, vision-opd-6k-000000"):
        prepare.prepare(tmp_path / "out", published, choices=CHOICES)


def test_a_bbox_of_unknown_meaning_is_an_error(layout: ModuleType, tmp_path: Path) -> None:
    published = layout.build(
        tmp_path / "set", 20, change=lambda i, row: row | {"bbox": [e % 97 for e in row["bbox"]]}
    )
    with pytest.raises(UserError, match="its meaning cannot be verified"):
        prepare.prepare(tmp_path / "out", published, choices=CHOICES)


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
        def dataset_info(self, repo_id: str, revision: str | None) -> SimpleNamespace:
            assert repo_id == source.HUB_ID
            return SimpleNamespace(sha=revision or fake.sha)

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


def test_the_hubs_revision_is_recorded_and_checked(hub: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    meta = prepare.prepare(out, choices=CHOICES)
    assert meta["revision"] == "a" * 40 == json.loads((out / "source.json").read_text())["revision"]
    assert all(row["provenance"].startswith("a" * 40) for row in schema.rows(out / "train.parquet"))
    assert prepare.prepare(out) == meta and hub.asked == ["a" * 40]
    hub.sha = "b" * 40
    assert prepare.prepare(out) == meta
    (out / "meta.json").unlink()  # as if interrupted before the end
    with pytest.raises(UserError, match=f"begun with revision {'a' * 40}.*is {'b' * 40}; give --revision"):
        prepare.prepare(out, choices=CHOICES)
    assert prepare.prepare(out, revision="a" * 40, choices=CHOICES) == meta
    with pytest.raises(UserError, match="begun with revision"):
        prepare.prepare(out, revision="c" * 40)


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
    assert said[-1].startswith(
        "train 28, validation 5, test 7 rows; 0 left out; bbox is x0, y0, x1, y1 in pixels"
    )
