"""One stage's results, one JSON line an item, written the moment it is known.

A killed run loses what was in flight and nothing else: a last line cut short is dropped, every other line is kept,
and an item whose id is in the file is never worked on again.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from vopd.errors import UserError
from vopd.redaction import redacted

Record = dict[str, Any]


class Journal:
    """Records of a stage by id, in the file's order. Each has `id`, and `reason`: None, or why it was rejected."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        if path.exists():
            self._load()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")

    def _load(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with self.path.open("r+b") as file:
                file.truncate(whole)
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                self.records[record["id"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.path}: line {number} is no record; delete the line.") from error

    def append(self, record: Record) -> None:
        """Keep one record: in memory, and handed to the operating system before this returns."""
        # A server's refusal may repeat the key that it was sent.
        line = redacted(json.dumps(record, ensure_ascii=False))
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self.records[record["id"]] = json.loads(line)

    def accepted(self) -> list[Record]:
        """Records without a reason against them, sorted by id: the order does not depend on who answered first."""
        return [r for _, r in sorted(self.records.items()) if r["reason"] is None]

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
