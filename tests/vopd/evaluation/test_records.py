"""Record files: written, read back, torn, broken, summed."""

import dataclasses
import json
from pathlib import Path

import pytest

from vopd.errors import UserError
from vopd.evaluation.records import (
    Appender,
    Record,
    answers,
    rates,
    rates_by,
    read_records,
    select,
    write_records,
)


def record(**changes: object) -> Record:
    fields: dict = {
        "id": "t-1", "family": "digit", "view": "full", "split": "test", "prompt": "What? 它\n",
        "response": "Answer: B\u2028", "response_tokens": 12, "truncated": False,
        "parsed": "B", "gold": "B", "correct": True,
    }  # fmt: skip
    return Record(**{**fields, **changes})


def append(path: Path, records: list[Record]) -> None:
    with Appender(path) as appender:
        for one in records:
            appender.append(one)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "records" / "before.jsonl"
    first, second = record(), record(view="crop", parsed=None, correct=False, truncated=True)
    append(path, [first])
    append(path, [second])
    result = read_records(path)
    assert result.records == [first, second]
    assert result.torn == 0


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_torn_last_line_is_dropped_counted_and_repaired(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "r.jsonl"
    append(path, [record(), record(id="t-2")])
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    torn = read_records(path)
    assert [r.id for r in torn.records] == ["t-1"]
    assert torn.torn == 1
    append(path, [record(id="t-2"), record(id="t-3")])
    repaired = read_records(path)
    assert [r.id for r in repaired.records] == ["t-1", "t-2", "t-3"]
    assert repaired.torn == 0


def test_an_empty_file_and_one_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("")
    assert read_records(path).records == []
    path.write_text('{"id": "t')
    assert read_records(path).torn == 1


def test_a_question_twice_in_a_view_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    append(path, [record(), record(view="crop"), record()])
    with pytest.raises(UserError, match=r"Line 3.*'t-1'.*'full'.*line 1"):
        read_records(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "Line 1 .*not JSON"),
        ("\xff", "Line 1 .*not JSON"),
        ("[1]", "not a JSON object"),
        (json.dumps({k: v for k, v in dataclasses.asdict(record()).items() if k != "gold"}), "no key 'gold'"),
        (json.dumps(dataclasses.asdict(record(correct=1))), "'correct'"),
        (json.dumps(dataclasses.asdict(record(response_tokens=True))), "'response_tokens'"),
        (json.dumps(dataclasses.asdict(record(id=7))), "'id'"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(
        line.encode("latin-1") + b"\n" + json.dumps(dataclasses.asdict(record())).encode() + b"\n"
    )
    with pytest.raises(UserError, match=message):
        read_records(path)


def test_a_finished_set_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "records" / "after.jsonl"
    assert write_records(path, [dataclasses.asdict(record()), record(id="t-2")]) == 2
    assert [r.id for r in read_records(path).records] == ["t-1", "t-2"]
    with pytest.raises(UserError, match=r"Record 2 .*'gold'"):
        write_records(path, [record(), {**dataclasses.asdict(record(id="t-2")), "gold": None}])
    assert len(read_records(path).records) == 2
    assert [p.name for p in path.parent.iterdir()] == ["after.jsonl"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        read_records(tmp_path / "nowhere.jsonl")


def test_rates_by_group() -> None:
    records = [
        record(id="a"),
        record(id="b", correct=False, parsed=None, truncated=True, response_tokens=20),
        record(id="a", view="crop"),
        record(id="c", split="holdout", family="letter", correct=False, parsed="A"),
    ]
    table = rates_by(records)
    assert list(table) == [
        ("crop", "test", "digit"),
        ("full", "holdout", "letter"),
        ("full", "test", "digit"),
    ]
    both = table["full", "test", "digit"]
    assert (both.count, both.accuracy, both.truncated, both.unparsed, both.response_tokens) == (
        2,
        0.5,
        0.5,
        0.5,
        16,
    )
    assert table["full", "holdout", "letter"].unparsed == 0
    assert {k: v.count for k, v in rates_by(records, ["view"]).items()} == {("crop",): 1, ("full",): 3}
    with pytest.raises(UserError):
        rates([])


def test_answers_need_one_view() -> None:
    records = [record(id="a"), record(id="a", view="crop", correct=False), record(id="b", split="holdout")]
    assert answers(select(records, view="full", split="test")) == {"a": True}
    assert answers(select(records, view="crop")) == {"a": False}
    with pytest.raises(UserError, match="'a' occurs twice"):
        answers(records)
