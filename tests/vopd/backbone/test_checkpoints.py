"""Checkpoints on disk: whole or absent, damage of every kind noticed, the last good one never lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vopd.backbone import checkpoints
from vopd.errors import UserError


def write(folder: Path, step: int, text: str = "weights") -> Path:
    with checkpoints.writing(folder, step) as place:
        (place / "actor").mkdir()
        (place / "actor" / "weights.bin").write_text(f"{text} {step}")
        (place / "data.pt").write_text("position")
    return checkpoints.place(folder, step)


def test_a_checkpoint_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    with checkpoints.writing(tmp_path, 3) as place:
        (place / "weights").write_text("w")
        assert checkpoints.found(tmp_path) == []
    (only,) = checkpoints.found(tmp_path)
    assert (only.step, checkpoints.problem(only)) == (3, None)
    assert [path.name for path in tmp_path.iterdir()] == ["global_step_3"]


def test_a_failed_write_leaves_the_older_one_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 1)

    def fail() -> None:
        with checkpoints.writing(tmp_path, 2) as place:
            (place / "half").write_text("h")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["global_step_1"]
    assert checkpoints.newest_whole(tmp_path)[0] == checkpoints.found(tmp_path)[0]


def test_what_a_kill_left_is_taken_away(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "writing_2" / "actor").mkdir(parents=True)
    (tmp_path / "removing_global_step_0").mkdir()
    newest, said = checkpoints.newest_whole(tmp_path)
    assert newest and newest.step == 1 and said == []
    assert [path.name for path in tmp_path.iterdir()] == ["global_step_1"]


def test_the_newest_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (9, 10, 2):
        write(tmp_path, step)
    assert [c.step for c in checkpoints.found(tmp_path)] == [10, 9, 2]
    checkpoints.prune(tmp_path, 2)
    assert [c.step for c in checkpoints.found(tmp_path)] == [10, 9]


def flipped(folder: Path) -> None:
    file = folder / "actor" / "weights.bin"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (flipped, "actor/weights.bin has changed"),
    "truncated": (lambda f: (f / "actor" / "weights.bin").write_text("w"), "actor/weights.bin has 1 bytes"),
    "missing shard": (lambda f: (f / "actor" / "weights.bin").unlink(), "actor/weights.bin is missing"),
    "missing data state": (lambda f: (f / "data.pt").unlink(), "data.pt is missing"),
    "no manifest": (lambda f: (f / checkpoints.SEAL).unlink(), "manifest.json is missing"),
    "empty manifest": (lambda f: (f / checkpoints.SEAL).write_text(""), "manifest.json cannot be read"),
    "manifest of another kind": (lambda f: (f / checkpoints.SEAL).write_text("[1]"), "manifest.json cannot"),
    "a folder in place of a file": (
        lambda f: ((f / "data.pt").unlink(), (f / "data.pt").mkdir()),
        "data.pt is missing",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_said_and_the_previous_one_taken(tmp_path: Path, kind: str) -> None:
    damage, said = DAMAGE[kind]
    write(tmp_path, 1)
    damage(write(tmp_path, 2))
    newest, sentences = checkpoints.newest_whole(tmp_path)
    assert newest and newest.step == 1
    assert len(sentences) == 1 and sentences[0].startswith(f"the checkpoint of update 2 is damaged: {said}")
    assert (tmp_path / "damaged_step_2").is_dir()
    write(tmp_path, 2)
    checkpoints.prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["global_step_2"]


@pytest.mark.parametrize("kind", DAMAGE)
def test_without_a_whole_one_nothing_is_trained_from_the_start(tmp_path: Path, kind: str) -> None:
    DAMAGE[kind][0](write(tmp_path, 2))
    for _ in range(2):  # not at the next start either
        with pytest.raises(UserError, match="no checkpoint is whole"):
            checkpoints.newest_whole(tmp_path)


def test_a_manifest_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    folder = write(tmp_path / "checkpoints", 1)
    seal = json.loads((folder / checkpoints.SEAL).read_text())
    seal["files"]["../../secret"] = [1, "0"]
    (folder / checkpoints.SEAL).write_text(json.dumps(seal))
    assert checkpoints.problem(checkpoints.Checkpoint(1, folder)) == "../../secret is missing"


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert checkpoints.newest_whole(tmp_path / "nowhere") == (None, [])


def test_the_same_update_written_again_replaces_the_first(tmp_path: Path) -> None:
    write(tmp_path, 2, "old")
    folder = write(tmp_path, 2, "new")
    assert (folder / "actor" / "weights.bin").read_text() == "new 2"
    shutil.rmtree(folder)
