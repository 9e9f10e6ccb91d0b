"""The one place for what can be made again: prepared data, base answers, hashes, checks that were passed.

`VOPD_CACHE`, or else `.cache` in the checkout, or else (a read-only checkout) `$XDG_CACHE_HOME/vopd`, which is
`~/.cache/vopd` by default. An entry is written whole or not at all and carries its checksum: one that is torn, damaged
or of another program counts as absent and is made again. A full or read-only cache never stops a run.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from vopd.common import files
from vopd.common.paths import ROOT
from vopd.errors import UserError

VARIABLE = "VOPD_CACHE"
NAME = ".cache"
_MAGIC = b"vopd cache entry "
_said: set[str] = set()


def place() -> Path:
    """The folder of all caches; it need not exist yet. A relative `VOPD_CACHE` starts at the checkout."""
    if given := os.environ.get(VARIABLE):
        return ROOT / Path(given).expanduser()
    own = ROOT / NAME
    if os.access(own if own.exists() else ROOT, os.W_OK | os.X_OK):
        return own
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vopd"


def inside(path: str | Path) -> Path:
    """A path of a setting: `.cache/...` is in the cache's folder, other relative paths in the checkout."""
    parts = Path(path).parts
    return place().joinpath(*parts[1:]) if parts[:1] == (NAME,) else ROOT / path


def read(kind: str, key: str) -> bytes | None:
    """The content of an entry, or None: absent, unreadable, torn, or not one of ours."""
    try:
        head, _, content = (place() / kind / key).read_bytes().partition(b"\n")
    except OSError:
        return None
    return content if head == _head(content) else None


def store(kind: str, key: str, content: bytes = b"") -> bool:
    """Write an entry, whole or not at all; False, after one note on standard error, where that cannot be done."""
    file = place() / kind / key
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(file, _head(content) + b"\n" + content)  # torn by a power failure, it is seen
    except OSError as error:
        _note(f"the cache {place()} cannot be written ({error.strerror}); continuing without it")
        return False
    return True


def workspace(kind: str, key: str) -> Path:
    """A folder that a library may fill for this key; a temporary one where the cache cannot be written."""
    folder = place() / kind / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
        reason = os.strerror(errno.EACCES)
    except OSError as error:
        reason = str(error.strerror)
    _note(f"the cache {place()} cannot be written ({reason}); continuing without it")
    temporary = Path(tempfile.mkdtemp(prefix="vopd-cache-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


def results_folder(folder: Path, setting: str = "run_dir=...") -> Path:
    """Make sure that results can be written to a folder; `UserError` names the ways to another place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable, reason = os.access(folder, os.W_OK | os.X_OK), os.strerror(errno.EACCES)
        if not writable and os.statvfs(folder).f_flag & os.ST_RDONLY:
            reason = os.strerror(errno.EROFS)
    except OSError as error:
        writable, reason = False, str(error.strerror)
    if not writable:
        raise UserError(
            f"{folder}: results cannot be written there ({reason}); set VOPD_RUNS to a folder that can be written, "
            f"or give {setting}"
        )
    return folder


def _head(content: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(content).hexdigest().encode()


def _note(sentence: str) -> None:
    if sentence not in _said:
        _said.add(sentence)
        print(f"vopd: note: {sentence}.", file=sys.stderr)
