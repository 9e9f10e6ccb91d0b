"""One stage's results, one JSON line an item, written the moment it is known.

A killed run loses what was in flight and nothing else: a last line cut short is dropped, every other line is kept,
and an item whose id is in the file is never worked on again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from vopd.common import jsonl
from vopd.common.redaction import redacted
from vopd.errors import UserError

Record = dict[str, Any]


class Journal:
    """Records of a stage by id, in the file's order. Each has `id`, and `reason`: None, or why it was rejected.

    fields: what an accepted record holds beside, by name and type; `UserError` for a line that does not.
    """

    def __init__(self, path: Path, fields: Mapping[str, type] = MappingProxyType({})) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        for number, record in jsonl.objects(path.read_bytes() if path.exists() else b"", path):
            if not _is_record(record, fields):
                raise UserError(f"Line {number} of {path} is not a record of this stage; remove the line.")
            self.records[record["id"]] = record
        self._lines = jsonl.Appender(path)

    def append(self, record: Record) -> None:
        """Keep one record: in memory, and handed to the operating system before this returns."""
        # A server's refusal may repeat the key that it was sent.
        record = json.loads(redacted(json.dumps(record, ensure_ascii=False)))
        self._lines.append(record)
        self.records[record["id"]] = record

    def accepted(self) -> list[Record]:
        """Records without a reason against them, sorted by id: the order does not depend on who answered first."""
        return [r for _, r in sorted(self.records.items()) if r["reason"] is None]

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.__exit__(kind, error, trace)


def _is_record(record: Record, fields: Mapping[str, type]) -> bool:
    reason, tokens = record.get("reason", 0), record.get("tokens", [0, 0])
    counted = isinstance(tokens, list) and len(tokens) == 2 and all(isinstance(t, int) for t in tokens)
    if not isinstance(record.get("id"), str) or not counted:
        return False
    if reason is None:
        return all(isinstance(record.get(name), kind) for name, kind in fields.items())
    return isinstance(reason, str)
