"""A file is whole or as it was, whatever happens while it is written, and what a kill leaves is taken away."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vopd.common import files

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=50)


@given(st.text(), st.binary())
def test_content_comes_back_and_nothing_else_is_left(text: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file"
        files.write_bytes(file, content)
        assert file.read_bytes() == content
        files.write_text(file, text, sync=True)
        assert file.read_bytes() == text.encode()
        assert os.listdir(folder) == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def broken_off() -> None:
        with files.replacing(file) as partial:
            partial.write_text("half")
            assert file.read_text() == "old"
            raise error

    with pytest.raises(type(error)):
        broken_off()
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "file").symlink_to(tmp_path / "mine")
    files.write_text(tmp_path / "file", "new")
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize(("sync", "flushed"), [(False, []), (True, ["partial", "file", "folder"])])
def test_sync_waits_for_the_content_before_the_name_and_for_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool, flushed: list[str]
) -> None:
    seen: list[str] = []
    replace = os.replace

    def fsync(descriptor: int) -> None:
        seen.append("folder" if os.path.samestat(os.fstat(descriptor), tmp_path.stat()) else "partial")

    def renamed(old: Path, new: Path) -> None:
        replace(old, new)
        seen.extend(["file"] if sync else [])

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", renamed)
    files.write_text(tmp_path / "file", "x", sync)
    assert seen == flushed


@given(NAMES.filter(lambda name: name not in (".", "..")))
def test_temporary_names_are_unique_and_known_again(name: str) -> None:
    file = Path("folder") / name
    first, second = files.temporary(file), files.temporary(file)
    assert first != second and first.parent == file.parent
    assert files.is_temporary(first.name) and not files.is_temporary("config.yaml")


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from vopd.common import files\n"
        "file = files.temporary(Path(sys.argv[1]) / 'deep' / 'file'); file.write_text('half')\n"
        "place = files.temporary(Path(sys.argv[1]) / 'scratch'); place.mkdir(); (place / 'x').write_text('half')\n"
        "os._exit(9)"
    )
    (tmp_path / "deep").mkdir()
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 9
    (tmp_path / ".mine.partial").write_text("a name of a person's own")
    mine = files.temporary(tmp_path / "file")
    mine.write_text("being written")
    assert len(list(tmp_path.rglob("*.partial"))) == 4
    files.remove_left(tmp_path)
    assert sorted(tmp_path.rglob("*.partial")) == sorted([mine, tmp_path / ".mine.partial"])
