"""Only what a command made itself is written over; a kill at any point leaves nothing unaccounted for."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vopd.common import ownership
from vopd.common.ownership import LEDGER, atomic, belongs, claim
from vopd.errors import UserError

MAKER = "some.command"


def made(folder: Path, **texts: str) -> Path:
    owned = claim(folder, MAKER)
    for name, text in texts.items():
        owned.write_text(name, text)
    return folder


def content(folder: Path) -> dict[str, str]:
    """What a user sees in the folder; temporary files too, of which none may be left."""
    return {f.name: f.read_text() for f in folder.iterdir() if f.name != LEDGER}


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_a_new_or_empty_folder_is_taken(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "out"
    if there:
        folder.mkdir()
        (folder / ".DS_Store").write_text("")
    assert ownership.is_empty(folder) and not belongs(folder, MAKER)
    made(folder, a="1")
    assert belongs(folder, MAKER) and not ownership.is_empty(folder)
    assert content(made(folder, a="2", b="3")) in (
        {"a": "2", "b": "3"},
        {"a": "2", "b": "3", ".DS_Store": ""},
    )


def test_a_folder_of_someone_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(UserError, match=r"holds a, which some\.command did not make"):
        claim(tmp_path, MAKER)
    assert content(tmp_path) == {"a": "mine"} and not (tmp_path / LEDGER).exists()


def test_edits_and_additions_are_noticed_and_removals_are_not_minded(tmp_path: Path) -> None:
    made(tmp_path, a="1", b="2")
    (tmp_path / "a").write_text("!")
    with pytest.raises(UserError, match=r"a: changed since some\.command made it"):
        claim(tmp_path, MAKER)
    (tmp_path / "a").unlink()
    claim(tmp_path, MAKER)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds deep/notes\.txt"):
        claim(tmp_path, MAKER)


def test_an_edit_of_the_same_size_and_time_needs_both(tmp_path: Path) -> None:
    made(tmp_path, a="1")
    (tmp_path / "a").write_text("2")
    with pytest.raises(UserError, match="changed since"):
        claim(tmp_path, MAKER)


def test_a_copied_folder_is_still_the_makers(tmp_path: Path) -> None:
    made(tmp_path / "one", a="1")
    subprocess.run(["cp", "-r", tmp_path / "one", tmp_path / "two"], check=True)
    assert content(made(tmp_path / "two", a="2")) == {"a": "2"}


def test_another_makers_folder_is_refused(tmp_path: Path) -> None:
    made(tmp_path, a="1")
    with pytest.raises(UserError, match=r"made by some\.command, not by other"):
        claim(tmp_path, "other")
    (tmp_path / "a").unlink()
    claim(tmp_path, "other").write_text("a", "2")
    with pytest.raises(UserError, match=r"made by other"):
        claim(tmp_path, MAKER)


def test_commands_that_share_a_folder_look_at_their_own_names(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    claim(tmp_path, "report", names=("table", "page")).write_text("table", "1")
    claim(tmp_path, "report", names=("table", "page")).write_text("table", "2")
    (tmp_path / "page").write_text("mine")
    with pytest.raises(UserError, match="holds page"):
        claim(tmp_path, "report", names=("table", "page"))
    assert content(tmp_path) == {"thesis.txt": "mine", "table": "2", "page": "mine"}
    made(tmp_path / "set", a="1")
    claim(tmp_path / "set", "report", names=("table",)).write_text("table", "1")
    assert content(made(tmp_path / "set", a="2")) == {"a": "2", "table": "1"}


def test_working_files_may_hold_anything_in_a_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "one").write_text("")
    with pytest.raises(UserError, match="holds stages/one"):
        claim(tmp_path, MAKER, working=("stages/*",))
    folder = made(tmp_path / "out", a="1")
    (folder / "stages").mkdir()
    (folder / "stages" / "one").write_text("grows")
    claim(folder, MAKER, working=("stages/*",))


def test_what_an_earlier_version_wrote_is_recognised_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    recognise = [tmp_path / "a"].__contains__
    assert belongs(tmp_path, MAKER, recognise)
    claim(tmp_path, MAKER, recognise=recognise).write_text("b", "new")
    (tmp_path / "a").write_text("edited")
    with pytest.raises(UserError, match="a: changed since"):
        claim(tmp_path, MAKER, recognise=recognise)
    (tmp_path / "c").write_text("mine")
    with pytest.raises(UserError, match="changed since"):
        claim(tmp_path, MAKER, recognise=lambda _: True)


def test_links_are_not_written_through(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    other = tmp_path / "other"
    other.mkdir()
    folder = made(tmp_path / "out", a="1")
    (folder / "a").unlink()
    (folder / "a").symlink_to(precious)
    with pytest.raises(UserError, match="changed since"):
        claim(folder, MAKER)
    (folder / "a").unlink()
    owned = claim(folder, MAKER, working=("images", "images/*"))
    (folder / "images").symlink_to(other)
    with pytest.raises(UserError, match="a link that leads out of"):
        claim(folder, MAKER, working=("images", "images/*"))
    with pytest.raises(UserError, match="a link that leads out of"):
        owned.write_text("images/x", "1")
    (tmp_path / "link").symlink_to(precious)
    with atomic(tmp_path / "link") as partial:
        partial.write_text("new")
    assert precious.read_text() == "mine" and (tmp_path / "link").read_text() == "new"
    assert list(other.iterdir()) == []
    (tmp_path / "forged").mkdir()
    (tmp_path / "forged" / LEDGER).symlink_to(precious)
    with pytest.raises(UserError, match="cannot be read"):
        claim(tmp_path / "forged", MAKER)
    assert precious.read_text() == "mine"


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    made(tmp_path / "out", a="1")
    assert content(made(tmp_path / "out", a="2")) == {"a": "2"}


def test_nothing_changes_where_the_body_raises(tmp_path: Path) -> None:
    folder = made(tmp_path, a="1")
    owned = claim(folder, MAKER)
    with pytest.raises(TypeError), owned.writing("a") as partial:
        partial.write_bytes("2")  # type: ignore[arg-type]
    assert content(folder) == {"a": "1"}
    claim(folder, MAKER)


def test_clear_removes_what_is_the_makers(tmp_path: Path) -> None:
    owned = claim(tmp_path, MAKER)
    for name in ("a", "deep/b", "c"):
        owned.write_text(name, "1")
    (tmp_path / "c").write_text("edited")
    (tmp_path / "d").write_text("mine")
    owned.clear()
    assert content(tmp_path / "deep") == {} and not (tmp_path / "a").exists()
    assert (tmp_path / "c").read_text() == "edited" and (tmp_path / "d").read_text() == "mine"


KILLED = """
import os, sys
from pathlib import Path
from vopd.common import ownership
owned = ownership.claim(Path(sys.argv[1]), "some.command")
if sys.argv[2] == "before":
    with owned.writing("a") as partial:
        partial.write_text("2")
        os._exit(9)
os.replace = lambda *_: os._exit(9)
owned.write_text("a", "2")
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_before_or_after_the_note_leaves_a_folder_that_is_the_makers(
    tmp_path: Path, moment: str
) -> None:
    folder = made(tmp_path, a="1")
    done = subprocess.run([sys.executable, "-c", KILLED, folder, moment], env=os.environ, check=False)
    assert done.returncode == 9
    assert (folder / "a").read_text() == "1" and list(folder.glob(".*.partial"))
    claim(folder, MAKER)
    assert not list(folder.glob(".*.partial"))


@given(st.binary(max_size=40))
def test_a_torn_ledger_grants_nothing_more(tmp_path_factory: pytest.TempPathFactory, tail: bytes) -> None:
    folder = made(tmp_path_factory.mktemp("torn"), a="1")
    with (folder / LEDGER).open("ab") as stream:
        stream.write(tail)
    claim(folder, MAKER).write_text("b", "2")
    claim(folder, MAKER)
    (folder / "b").write_text("3")
    with pytest.raises(UserError, match="changed since"):
        claim(folder, MAKER)


@pytest.mark.parametrize("line", ["3", "[]", '{"maker": 3, "name": []}', '{"folder": true}', '"x"'])
def test_odd_lines_in_a_ledger(tmp_path: Path, line: str) -> None:
    made(tmp_path, a="1")
    with (tmp_path / LEDGER).open("a") as stream:
        stream.write(line + "\n")
    made(tmp_path, a="2")


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    owned = [claim(tmp_path, MAKER) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            list(pool.map(lambda i: owned[i].write_text("a", str(i) * 50_000), range(4)))
    assert len(set((tmp_path / "a").read_text())) == 1 and set(content(tmp_path)) == {"a"}
    claim(tmp_path, MAKER)


def test_places_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"file.*: (a file, not|cannot be)"):
            claim(folder, MAKER)
    made(tmp_path / "out", a="1")
    (tmp_path / "out" / "deep").mkdir()
    with pytest.raises(UserError, match="deep: cannot be written"):
        claim(tmp_path / "out", MAKER).write_text("deep", "1")


def test_a_full_disk_is_a_sentence_and_the_old_file_stays(tmp_path: Path) -> None:
    owned = claim(made(tmp_path, a="1"), MAKER)
    with pytest.raises(UserError, match="No space left"), owned.writing("a"):
        raise OSError(28, "No space left on device")
    with pytest.raises(FileNotFoundError), owned.writing("a"):
        (tmp_path / "source").read_text()
    assert content(tmp_path) == {"a": "1"}


def test_the_ledger_holds_no_place(tmp_path: Path) -> None:
    made(tmp_path, a="1")
    lines = [json.loads(line) for line in (tmp_path / LEDGER).read_text().splitlines() if line]
    assert [sorted(line) for line in lines] == [
        ["folder", "maker"],
        ["bytes", "maker", "mtime_ns", "name", "sha256"],
    ]
    assert str(tmp_path) not in (tmp_path / LEDGER).read_text()
