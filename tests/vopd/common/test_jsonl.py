"""Files of JSON lines on a full disk, torn, or written by somebody else; and arbitrary overrides."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from vopd.common import jsonl
from vopd.common.overrides import Tree
from vopd.errors import UserError
from vopd.evaluation.evaluate import Settings, settings_of


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: a write ends as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def lines_of(path: Path) -> list[int]:
    return [fields["n"] for _, fields in jsonl.objects(path.read_bytes(), path)]


def test_a_line_that_finds_no_room_is_taken_back_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [{"n": n, "text": "x" * 40} for n in range(3)]
    with jsonl.Appender(path) as file, disk_of(150):
        file.append(lines[0])
        file.append(lines[1])
        with pytest.raises(UserError, match=r"a\.jsonl: cannot be written .*kept: make room"):
            file.append(lines[2])
    assert lines_of(path) == [0, 1] and path.read_bytes().endswith(b"\n")
    with jsonl.Appender(path) as file:
        file.append({"n": 2})
    assert lines_of(path) == [0, 1, 2]


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.jsonl").mkdir()
    for path in (tmp_path / "file" / "a.jsonl", tmp_path / "folder.jsonl", Path("/proc/none/a.jsonl")):
        with pytest.raises(UserError, match=f"{path}: cannot be written"):
            jsonl.Appender(path)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("line", [b"{", b"[1]", b"null", b'"\xff"', b"[" * 5000, b"1" * 5000, b"\0", b""])
def test_a_line_that_is_none_is_named(line: bytes) -> None:
    with pytest.raises(UserError, match=r"Line 2 of a\.jsonl is not"):
        list(jsonl.objects(b'{"n": 1}\n' + line + b'\n{"n": 2}\n', Path("a.jsonl")))


@given(st.binary())
def test_any_content_is_lines_or_a_sentence(content: bytes) -> None:
    with suppress(UserError):
        assert all(isinstance(fields, dict) for _, fields in jsonl.objects(content, Path("a")))


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none())), st.data())
def test_cut_anywhere_whole_lines_are_kept(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    with jsonl.Appender(path) as file:
        for row in rows:
            file.append(row)
    content = path.read_bytes()
    cut = content[: data.draw(st.integers(0, len(content)))]
    assert [fields for _, fields in jsonl.objects(cut, path)] == rows[: cut.count(b"\n")]


KEYS = st.sampled_from(
    ["model", "seed", "rows", "benchmarks", "judge.model", "judge", "vllm.a", "views", "", "x"]
)
VALUES = st.sampled_from(
    ["", "1", "[a,b]", "[a, b", "nan", "null", "${seed}", "${", "{a: b}", "&a [*a]", "???", "!!b"]
)


@given(st.lists(st.builds("{}={}".format, KEYS, VALUES | st.text()) | st.text(), max_size=6))
def test_any_overrides_are_applied_or_refused(overrides: list[str]) -> None:
    with suppress(UserError):
        Tree(OmegaConf.structured(Settings)).override(overrides)
    with suppress(UserError):
        assert settings_of(overrides).concurrency >= 1


def test_lines_are_plain_json(tmp_path: Path) -> None:
    with jsonl.Appender(tmp_path / "a.jsonl") as file:
        file.append({"text": "ü\ud800\u2028\n"})
    (line,) = (tmp_path / "a.jsonl").read_text().splitlines()
    assert json.loads(line) == {"text": "ü\ud800\u2028\n"}
