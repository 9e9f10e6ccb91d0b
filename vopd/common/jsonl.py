"""Append-only files of JSON lines: what a kill, a full disk or a stranger's hand leaves is kept or named, never fatal.

A line is in the file whole or not at all: one that cannot be written whole (a full disk) is taken back, and a last
line torn by a kill is cut off before the next append. Records of answers, a judge's verdicts and the stages of a
synthesis are kept so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from vopd.errors import UserError


def drop_torn_line(path: Path) -> None:
    """Cut a file back to its last complete line, so that an append does not continue a torn one."""
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def objects(content: bytes, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of every complete line; what follows the last line break is not a line.

    Raises:
        UserError: naming the line (from 1) that is not a JSON object.
    """
    complete = content.rpartition(b"\n")[0]
    for number, line in enumerate(complete.split(b"\n") if complete else [], start=1):
        where = f"Line {number} of {path}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:  # broken JSON, broken UTF-8, a thousand brackets
            raise UserError(f"{where} is not JSON ({error}); remove the line or the file.") from error
        if not isinstance(fields, dict):
            raise UserError(f"{where} is not a JSON object; remove the line or the file.")
        yield number, fields


class Appender:
    """A file open for appending. Each line is with the operating system before `append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                drop_torn_line(path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); give another place.") from error

    def append(self, fields: Mapping[str, Any]) -> None:
        """Write one line; UserError when there is no room for it, with every earlier line kept."""
        line = json.dumps(fields).encode() + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            self._file.truncate(end)
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); what it holds is kept: make room and run the "
                "same command again."
            ) from error

    def __enter__(self) -> Appender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
