"""Preparation: files appear once, are reused, and follow their settings."""

import fcntl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data import schema, validation_stamp
from data.miniature import prepare


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "ROWS", {"train": 6, "validation": 3, "test": 3, "holdout": 4})


def test_writes_reuses_and_rewrites(tmp_path: Path) -> None:
    first = prepare.prepare(tmp_path, train_rows=6)
    assert first["rows"] == prepare.ROWS
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("[!.]*")}
    assert len(stamps) == 6 and not list(tmp_path.glob("*.partial"))
    assert prepare.prepare(tmp_path, train_rows=6) == first
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    other = prepare.prepare(tmp_path, train_rows=4)
    assert len(schema.read(tmp_path / "train.parquet")) == 4
    assert other["sha256"]["train"] != first["sha256"]["train"]
    assert other["sha256"]["test"] == first["sha256"]["test"]


def test_what_is_written_is_validated(tmp_path: Path) -> None:
    prepare.prepare(tmp_path, train_rows=6)
    hashes = validation_stamp.check(tmp_path, prepare.ROWS)
    (tmp_path / validation_stamp.NAME).unlink()
    prepare.prepare(tmp_path, train_rows=6)
    assert validation_stamp.check(tmp_path, prepare.ROWS) == hashes


def test_same_settings_same_bytes(tmp_path: Path) -> None:
    one, two = (prepare.prepare(tmp_path / d, train_rows=6) for d in "ab")
    assert one == two


def test_holdout_asks_about_letters_only(tmp_path: Path) -> None:
    prepare.prepare(tmp_path, train_rows=6)
    assert set(schema.read(tmp_path / "holdout.parquet")["family"]) == {"letter"}
    assert "letter" not in schema.read(tmp_path / "train.parquet")["family"]


def test_a_second_run_waits_for_the_first_one(tmp_path: Path) -> None:
    with (tmp_path / ".vopd-lock").open("w") as lock, ThreadPoolExecutor() as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = pool.submit(prepare.prepare, tmp_path, 6)
        with pytest.raises(TimeoutError):
            second.result(timeout=1.0)
        assert not list(tmp_path.glob("*.par*"))
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert second.result(timeout=60)["rows"] == prepare.ROWS
