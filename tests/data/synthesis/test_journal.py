"""The journal keeps every whole line, wherever a kill cuts the file."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.synthesis.journal import Journal
from vopd.errors import UserError

RECORDS = [{"id": f"r{n}", "reason": None if n % 2 else "no: ünusable\n", "n": n} for n in range(5)]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("journal") / "stage.jsonl"
    with Journal(path) as journal:
        for record in RECORDS:
            journal.append(record)
            assert path.read_bytes().endswith(b"\n")  # nothing waits in a buffer
    return path.read_bytes()


@given(data=st.data())
def test_cut_anywhere_it_resumes(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(whole)))
    path = tmp_path_factory.mktemp("cut") / "stage.jsonl"
    path.write_bytes(whole[:cut])
    with Journal(path) as journal:
        kept = len(journal.records)
        assert list(journal.records.values()) == RECORDS[:kept]
        assert kept == whole[:cut].count(b"\n")
        for record in RECORDS[kept:]:
            journal.append(record)
    assert path.read_bytes() == whole
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [r["id"] for r in RECORDS]


def test_a_broken_line_inside_is_named(tmp_path: Path) -> None:
    path = tmp_path / "stage.jsonl"
    path.write_text('{"id": "a", "reason": null}\n{"id": \n{"id": "b", "reason": null}\n')
    with pytest.raises(UserError, match="Line 2"):
        Journal(path)
