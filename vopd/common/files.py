"""Files that appear whole or not at all: filled under a temporary name beside their place, then renamed.

Temporary names are unique, so two writers cannot mix, and name the writer, so that `remove_left` can tell those of
processes that were killed. A link by the file's name is replaced, not written through. Errors are the system's
(`OSError`); `vopd.common.ownership` turns them into sentences for folders that a user names.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_TEMPORARY = re.compile(r"\..+\.(?P<host>[^.]*)-(?P<pid>\d+)-[0-9a-f]{8}\.partial", re.S)
_HOST = re.sub(r"\W", "_", socket.gethostname())[:40]


@contextmanager
def replacing(file: Path, sync: bool = False) -> Iterator[Path]:
    """A temporary file to fill; at the end it takes the place of `file`. Nothing changes if the body raises.

    sync: wait for the disk, so that the file is whole under its name after a power failure too.
    """
    partial = temporary(file)
    try:
        yield partial
        if sync:
            _flush(partial)
        os.replace(partial, file)
        if sync:
            sync_folder(file.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_bytes(file: Path, content: bytes, sync: bool = False) -> None:
    """Replace a file by one with this content, or leave everything as it was. sync: as in `replacing`."""
    with replacing(file, sync) as partial:
        partial.write_bytes(content)


def write_text(file: Path, text: str, sync: bool = False) -> None:
    """`write_bytes` of a text in UTF-8, its line breaks as they are."""
    write_bytes(file, text.encode("utf-8"), sync)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk: a rename outlives a power failure only then."""
    _flush(folder)


def temporary(file: Path) -> Path:
    """A name beside `file` that nobody else has."""
    return file.with_name(f".{file.name[:60]}.{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")


def is_temporary(name: str) -> bool:
    """Whether a file's name is one that `temporary` gives."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_left(folder: Path) -> None:
    """Remove temporary files and folders, at any depth, of processes of this machine that are no more."""
    for file in list(folder.rglob(".*.partial")):
        match = _TEMPORARY.fullmatch(file.name)
        if match and match["host"] == _HOST and not psutil.pid_exists(int(match["pid"])):
            if file.is_dir():
                shutil.rmtree(file, ignore_errors=True)
            else:
                file.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
