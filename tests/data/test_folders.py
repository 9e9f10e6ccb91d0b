"""A set of someone is taken or refused, never prepared over; one that a preparer made, in this version or an earlier
one, is its own."""

import json
import shutil
from pathlib import Path

import pytest

from data import folders, schema, validate, validation_stamp
from data.miniature import prepare
from vopd.common import ownership
from vopd.errors import UserError

MINIATURE = folders.MINIATURE


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "ROWS", {"train": 6, "validation": 3, "test": 3, "holdout": 4})


@pytest.fixture(scope="module")
def someones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("someones")
    schema.write(prepare.rows("train", 6, 5), folder / "train.parquet")
    return folder


@pytest.fixture
def mine(someones: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(someones, tmp_path / "mine"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_set_of_someone_that_was_not_validated_is_refused_untouched(mine: Path) -> None:
    before = contents(mine)
    with pytest.raises(UserError, match=r"run `vopd data validate .*data\.prepare=null"):
        folders.needs_preparing(mine, MINIATURE)
    with pytest.raises(UserError, match=r"holds train\.parquet, which data\.miniature\.prepare did not make"):
        prepare.prepare(mine, 6)
    assert contents(mine) == before


def test_a_validated_set_of_someone_is_taken_as_it_is(mine: Path) -> None:
    assert validate.main([str(mine)]) == 0
    before = contents(mine)
    assert not folders.needs_preparing(mine, MINIATURE)
    with pytest.raises(UserError, match="did not make"):
        prepare.prepare(mine, 6)
    assert contents(mine) == before


def test_the_preparers_own_set_is_kept_and_made_again(tmp_path: Path) -> None:
    assert folders.needs_preparing(tmp_path / "new", MINIATURE)
    prepare.prepare(tmp_path / "new", 6)
    assert folders.needs_preparing(tmp_path / "new", MINIATURE)
    assert not folders.needs_preparing(tmp_path / "new", "a.preparer.of.mine")  # validated, and not its own
    prepare.prepare(tmp_path / "new", 4)
    validation_stamp.check(tmp_path / "new", prepare.ROWS)


def test_edits_in_the_preparers_set_stop_it_from_being_made_again(tmp_path: Path, someones: Path) -> None:
    prepare.prepare(tmp_path, 6)
    shutil.copyfile(someones / "train.parquet", tmp_path / "train.parquet")
    prepare.prepare(tmp_path, 6)  # nothing is to be made
    with pytest.raises(UserError, match=r"train\.parquet: changed since data\.miniature\.prepare made it"):
        prepare.prepare(tmp_path, 4)
    assert (tmp_path / "train.parquet").read_bytes() == (someones / "train.parquet").read_bytes()


def test_additions_to_the_preparers_set_stop_it_from_being_made_again(tmp_path: Path, someones: Path) -> None:
    prepare.prepare(tmp_path, 6)
    shutil.copyfile(someones / "train.parquet", tmp_path / "extra.parquet")
    with pytest.raises(UserError, match=r"holds extra\.parquet"):
        prepare.prepare(tmp_path, 4)


def test_a_set_of_an_earlier_version_is_recognised(tmp_path: Path, someones: Path) -> None:
    prepare.prepare(tmp_path, 6)
    (tmp_path / ownership.LEDGER).unlink()
    (tmp_path / ownership.LOCK).rename(tmp_path / ".preparing")
    (tmp_path / "test.partial").write_bytes(b"half")
    assert folders.needs_preparing(tmp_path, MINIATURE)
    prepare.prepare(tmp_path, 4)
    validation_stamp.check(tmp_path, prepare.ROWS)
    (tmp_path / ownership.LEDGER).unlink()
    shutil.copyfile(someones / "train.parquet", tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"holds train\.parquet"):
        prepare.prepare(tmp_path, 6)


def test_a_stamp_of_earlier_checks_is_renewed(tmp_path: Path) -> None:
    prepare.prepare(tmp_path, 6)
    content = json.loads((tmp_path / validation_stamp.NAME).read_text())
    (tmp_path / validation_stamp.NAME).write_text(json.dumps(content | {"checks": 1}))
    prepare.prepare(tmp_path, 6)
    validation_stamp.check(tmp_path, prepare.ROWS)


@pytest.mark.parametrize(
    "content", ["{", "[]", "7", '{"rows": 1}', '{"rows":1,"seed":0,"code":"","sha256":[]}']
)
def test_a_meta_file_of_someone_makes_no_set_the_preparers(mine: Path, content: str) -> None:
    (mine / folders.META).write_text(content)
    with pytest.raises(UserError, match="did not make"):
        prepare.prepare(mine, 6)
