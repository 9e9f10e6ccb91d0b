"""Where caches lie, and that a torn, foreign, full or read-only one is never believed and never in the way."""

import errno
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vopd.common import caches, files
from vopd.common.caches import ROOT
from vopd.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(caches.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(caches, "_said", set())
    return tmp_path / "cache"


def test_the_place_is_the_variable_s_then_the_checkout_s_then_the_user_s(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert caches.place() == cache
    monkeypatch.setenv(caches.VARIABLE, "elsewhere")
    assert caches.place() == ROOT / "elsewhere"
    monkeypatch.delenv(caches.VARIABLE)
    monkeypatch.setattr(caches, "ROOT", tmp_path)
    assert caches.place() == tmp_path / ".cache"
    monkeypatch.setattr(caches.os, "access", lambda path, mode: False)  # root may write anywhere
    monkeypatch.setenv("XDG_CACHE_HOME", "/x/caches")
    assert caches.place() == Path("/x/caches/vopd")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/people/someone")
    assert caches.place() == Path("/people/someone/.cache/vopd")


def test_settings_that_begin_with_cache_follow_it(cache: Path) -> None:
    assert caches.inside(".cache/miniature") == cache / "miniature"
    assert caches.inside("data/miniature/base") == ROOT / "data/miniature/base"
    assert caches.inside("/abs/.cache/x") == Path("/abs/.cache/x")


def test_an_entry_comes_back_as_it_was(cache: Path) -> None:
    assert caches.read("kind", "key") is None
    for content in (b"", b"one\ntwo\n"):
        assert caches.store("kind", "key", content)
        assert caches.read("kind", "key") == content
    assert [file.name for file in (cache / "kind").iterdir()] == ["key"]  # nothing half written is left


@given(st.binary(max_size=60), st.data())
def test_a_torn_or_damaged_entry_counts_as_absent(content: bytes, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv(caches.VARIABLE, folder)
        caches.store("kind", "key", content)
        file = Path(folder) / "kind" / "key"
        whole = file.read_bytes()
        at = data.draw(st.integers(0, len(whole) - 1))
        flipped = bytes([whole[at] ^ data.draw(st.integers(1, 255))])
        for damaged in (whole[:at], whole[:at] + flipped + whole[at + 1 :], whole + b"x", content):
            file.write_bytes(damaged)
            assert caches.read("kind", "key") is None
        caches.store("kind", "key", content)
        assert caches.read("kind", "key") == content


def test_a_cache_that_cannot_be_written_is_a_note_once(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.write_text("a file where the folder should be")
    assert not caches.store("kind", "first", b"x")
    assert not caches.store("kind", "second", b"x")
    assert caches.read("kind", "first") is None
    said = capsys.readouterr().err
    assert (
        said == f"vopd: note: the cache {cache} cannot be written (Not a directory); continuing without it.\n"
    )
    folder = caches.workspace("datasets", "key")
    (folder / "x").write_text("can be used")
    assert not folder.is_relative_to(cache)


def test_a_full_disk_leaves_the_old_entry(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    caches.store("kind", "key", b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "replace", full)
    assert not caches.store("kind", "key", b"new")
    assert "No space left on device" in capsys.readouterr().err
    assert caches.read("kind", "key") == b"old"
    assert len(list((cache / "kind").iterdir())) == 1


def test_a_folder_for_results_that_cannot_be_written_names_the_ways_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Not a directory.*VOPD_RUNS.*give out=\.\.\."):
        caches.results_folder(tmp_path / "file" / "run", "out=...")
    assert caches.results_folder(tmp_path / "new" / "run").is_dir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caches.os, "access", lambda path, mode: False)
        with pytest.raises(UserError, match="Permission denied"):
            caches.results_folder(tmp_path / "new" / "run")
