"""One JSON line per answered question: writing, reading and simple sums over them.

A record is the ground truth of an evaluation: the prompt, the raw response and how it was read. Files are
append-only, so that a killed run keeps what it has; a last line cut short by a kill is dropped and counted.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vopd.common import files, jsonl
from vopd.common.jsonl import drop_torn_line as drop_torn_line
from vopd.errors import UserError
from vopd.evaluation.scoring import ANSWER_TYPES

MAX_UNPACKED = 512 * 2**20


@dataclass(frozen=True)
class Record:
    """One question, answered in one view. parsed is None where the response was unparsed, response_tokens where a
    server did not count them.

    details: whatever else the writer knows (seconds, picture sizes, groups ...); in the file these keys stand
    beside the others.
    """

    id: str
    family: str
    view: str
    split: str
    prompt: str
    response: str
    response_tokens: int | None
    truncated: bool
    parsed: str | None
    gold: str
    correct: bool
    details: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class RecordFile:
    """The records of one file, and how many torn last lines (0 or 1) were dropped."""

    records: list[Record]
    torn: int


_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "family": (str,),
    "view": (str,),
    "split": (str,),
    "prompt": (str,),
    "response": (str,),
    "response_tokens": (int, type(None)),
    "truncated": (bool,),
    "parsed": (str, type(None)),
    "gold": (str,),
    "correct": (bool,),
}
_DETAILS: dict[str, tuple[type, ...]] = {
    "answer_type": (str,),
    "options": (list,),
    "groups": (dict,),
    "cluster": (str, type(None)),
    "concurrency": (int,),
    "seconds": (int, float),
    "image_in": (list,),
    "image_out": (list, type(None)),
}


class Appender:
    """A record file open for appending (`vopd.common.jsonl`)."""

    def __init__(self, path: Path) -> None:
        self._lines = jsonl.Appender(path)

    def append(self, record: Record) -> None:
        """Write one record; UserError when there is no room for it."""
        self._lines.append(_fields(record))

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, *error: Any) -> None:
        self._lines.__exit__(*error)


def write_records(path: Path, records: Iterable[Record | Mapping[str, Any]]) -> int:
    """Write a finished set as one file, whole or not at all; returns how many. Records may be plain mappings.

    UserError for a mapping without a key or with one of the wrong type; then nothing is written.
    """
    lines = []
    for number, given in enumerate(records, start=1):
        record = given if isinstance(given, Record) else _record(given, f"Record {number} for {path}")
        lines.append(json.dumps(_fields(record), ensure_ascii=True) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, "".join(lines))
    return len(lines)


def _fields(record: Record) -> dict[str, Any]:
    fields = dataclasses.asdict(record)
    return fields | fields.pop("details")


def _record(fields: Any, where: str) -> Record:
    if not isinstance(fields, Mapping):
        raise UserError(f"{where} is not a JSON object.")
    for key, types in _TYPES.items():
        if key not in fields:
            raise UserError(f"{where} has no key '{key}'.")
        value = fields[key]
        # bool is an int in Python; a token count of `true` is a mistake nevertheless.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise UserError(f"{where}: key '{key}' holds {value!r}, which is of the wrong type.")
    details = {key: value for key, value in fields.items() if key not in _TYPES}
    return Record(**{key: fields[key] for key in _TYPES}, details=details)


def read_packed(path: Path) -> bytes:
    """The content of a file, or of `<name>.gz` where only that is there, as records are kept in the repository.

    Raises:
        FileNotFoundError: neither is there.
        UserError: the packed file is broken, or holds more than MAX_UNPACKED bytes.
    """
    packed = path.with_name(path.name + ".gz")
    if path.is_file() or not packed.is_file():
        return path.read_bytes()
    try:
        with gzip.open(packed) as file:
            content = file.read(MAX_UNPACKED + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{packed} is not a whole gzip file ({error}); get it again.") from error
    if len(content) > MAX_UNPACKED:
        raise UserError(
            f"{packed} holds more than {MAX_UNPACKED >> 20} MiB; it is not a record file of vopd."
        )
    return content


def read_records(path: Path) -> RecordFile:
    """Read a record file, plain or packed (`read_packed`); keys beyond the record's become its details.

    UserError for a missing file, a broken line before the last, a missing or mistyped key, and for a question
    answered twice in one view.
    """
    try:
        content = read_packed(path)
    except FileNotFoundError as error:
        raise UserError(f"There is no record file {path}; run the evaluation first.") from error
    records: list[Record] = []
    seen: dict[tuple[str, str], int] = {}
    for number, fields in jsonl.objects(content, path):
        where = f"Line {number} of {path}"
        record = _record(fields, where)
        key = (record.id, record.view)
        if key in seen:
            raise UserError(
                f"{where} repeats question '{record.id}' in view '{record.view}' (first on line {seen[key]})."
            )
        seen[key] = number
        records.append(record)
    return RecordFile(records, torn=int(not content.endswith(b"\n") and bool(content)))


def read_answers(path: Path) -> RecordFile:
    """The record file of an evaluation: `read_records`, and that each record holds what scoring and figures take.

    UserError as there, and naming the record that lacks one of these details or holds another kind of value.
    """
    file = read_records(path)
    for record in file.records:
        for key, types in _DETAILS.items():
            value = record.details.get(key)
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise UserError(
                    f"{path}: the record of question '{record.id}' is not from an evaluation: {key} holds "
                    f"{value!r}; remove the line or the file."
                )
        if record.details["answer_type"] not in ANSWER_TYPES:
            raise UserError(
                f"{path}: the record of question '{record.id}' has the unknown answer type "
                f"'{record.details['answer_type']}'; remove the line or the file."
            )
    return file


def select(records: Iterable[Record], *, view: str | None = None, split: str | None = None) -> list[Record]:
    """Records of one view and/or split."""
    return [r for r in records if view in (None, r.view) and split in (None, r.split)]


def answers(records: Iterable[Record]) -> dict[str, bool]:
    """Question id -> correct or not, the form `statistics` takes; UserError when an id occurs twice."""
    result: dict[str, bool] = {}
    for record in records:
        if record.id in result:
            raise UserError(f"Question '{record.id}' occurs twice; select one view before comparing.")
        result[record.id] = record.correct
    return result


@dataclass(frozen=True)
class Rates:
    """Sums over a group of records, as fractions of `count`; response_tokens is the mean of those counted, or NaN."""

    count: int
    accuracy: float
    truncated: float
    unparsed: float
    response_tokens: float


def rates(records: Sequence[Record]) -> Rates:
    """Accuracy, truncation and unparsed rates and the mean response length; UserError when empty."""
    if not records:
        raise UserError("There are no records to sum over.")
    n = len(records)
    return Rates(
        count=n,
        accuracy=sum(r.correct for r in records) / n,
        truncated=sum(r.truncated for r in records) / n,
        unparsed=sum(r.parsed is None for r in records) / n,
        response_tokens=mean_tokens(records),
    )


def mean_tokens(records: Sequence[Record]) -> float:
    """Mean length of the responses whose tokens were counted; NaN where none was."""
    counted = [r.response_tokens for r in records if r.response_tokens is not None]
    return sum(counted) / len(counted) if counted else math.nan


Column = Literal["view", "split", "family"]


def rates_by(
    records: Iterable[Record], by: Sequence[Column] = ("view", "split", "family")
) -> dict[tuple[str, ...], Rates]:
    """Rates of each group of records that agree in the named columns, groups in sorted order."""
    return {key: rates(group) for key, group in sorted(_grouped(records, by))}


def _grouped(
    records: Iterable[Record], by: Sequence[Column]
) -> Iterator[tuple[tuple[str, ...], list[Record]]]:
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(getattr(record, column) for column in by), []).append(record)
    yield from groups.items()
