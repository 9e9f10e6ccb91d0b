"""Whose a folder is: a command writes over what it made itself, and over nothing else.

A command claims its folder before it writes. An empty or new one becomes its own. In one that holds something, every
file must be one that the command wrote there itself and that is unchanged since; anything else is an error, with
nothing written or removed. What a command wrote is listed in a ledger in the folder (`.vopd-files.jsonl`: name, size,
sha256 of every file, noted before the file gets its name, so that a kill at any point leaves no file unaccounted for).

Files appear under their names when they are complete. Temporary names are unique, so two writers cannot mix; those of a
process that was killed are removed at the next claim. Names that begin with a dot are never looked at: no command
writes any but the ledger, its locks and temporary files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from vopd.common.files import remove_left, replacing, temporary
from vopd.errors import UserError

LEDGER = ".vopd-files.jsonl"
LOCK = ".vopd-lock"

Recognise = Callable[[Path], bool]
"""Whether a file that no ledger names was written by an earlier version of the command."""


@dataclass(frozen=True)
class Owned:
    """A claimed folder: writes and removes the maker's files in it. Names are relative to the folder."""

    folder: Path
    maker: str

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A temporary file to fill; at the end it becomes `name`. Nothing changes if the body raises."""
        with atomic(self._inside(name)) as partial:
            yield partial
            _note(self.folder, {"maker": self.maker, "name": name, **_fingerprint(partial)})

    def write_text(self, name: str, text: str) -> None:
        """A whole text file, UTF-8."""
        with self.writing(name) as partial:
            partial.write_text(text, encoding="utf-8")

    def clear(self) -> None:
        """Removes every file that the maker wrote here and that is unchanged since."""
        for name, known in _read(self.folder).files(self.maker).items():
            file = self._inside(name)
            if file.is_file() and _is_one_of(file, known):
                file.unlink()

    def _inside(self, name: str) -> Path:
        file = self.folder / name
        if not file.parent.resolve().is_relative_to(self.folder.resolve()):
            raise UserError(
                f"{file.parent}: a link that leads out of {self.folder}; nothing is written there."
            )
        return file


def claim(
    folder: Path,
    maker: str,
    names: Sequence[str] = (),
    working: Sequence[str] = (),
    recognise: Recognise | None = None,
) -> Owned:
    """The right to write into `folder`, which is made if it is not there.

    Args:
        folder: where the command writes. It may be a link.
        maker: the command, as in `python -m MAKER`.
        names: files that it writes, for a command that shares its folder with others: only these are looked at.
            Otherwise the whole folder has to be the maker's.
        working: patterns of relative names that are the maker's in a folder of its own whatever they hold, such as
            journals that grow.
        recognise: asked for files in a folder without a ledger of this maker.

    Raises:
        UserError: something there is not the maker's, was changed since, or is a link that leads out of the folder; or
            the folder cannot be written to.
    """
    new, old = _examined(folder, maker, names, working, recognise)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_left(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror}); give another folder.") from error
    if new and not names:
        _note(folder, {"maker": maker, "folder": True})
    for name in old:
        if not _matches(name, working):
            _note(folder, {"maker": maker, "name": name, **_fingerprint(folder / name)})
    return Owned(folder, maker)


def check(
    folder: Path,
    maker: str,
    names: Sequence[str] = (),
    working: Sequence[str] = (),
    recognise: Recognise | None = None,
) -> None:
    """Raises what `claim` would, and changes nothing: for before a long computation."""
    _examined(folder, maker, names, working, recognise)


@contextmanager
def held(
    folder: Path,
    maker: str,
    working: Sequence[str] = (),
    recognise: Recognise | None = None,
    wait: bool = False,
) -> Iterator[Owned]:
    """`claim` of a whole folder which one process at a time may hold. A folder that is refused is not touched.

    Raises:
        UserError: as `claim`; or another process holds the folder, unless `wait` is set.
    """
    if not is_empty(folder) and not belongs(folder, maker, recognise):
        check(folder, maker, (), working, recognise)
    with ExitStack() as opened:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = opened.enter_context(open(folder / LOCK, "ab", opener=_no_link))
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process is writing here; wait for it or stop it.") from error
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written to ({error.strerror}); give another folder."
            ) from error
        yield claim(folder, maker, (), working, recognise)


def belongs(folder: Path, maker: str, recognise: Recognise | None = None) -> bool:
    """Whether the whole folder is `maker`'s: it claimed it before, or an earlier version of it wrote the content."""
    owner = _read(folder).owner
    return owner == maker or (owner is None and bool(_old_files(folder, (), recognise)))


def is_empty(folder: Path) -> bool:
    """Whether there is no folder, or nothing in it that a user would see."""
    return not folder.exists() or (folder.is_dir() and next(_names(folder), None) is None)


@contextmanager
def atomic(file: Path) -> Iterator[Path]:
    """`replacing`, with the folder made, and a `UserError` where it cannot be written to; no ledger is asked."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); give another place.") from error
    try:
        with replacing(file) as partial:
            yield partial
    except OSError as error:
        # A full disk has no file name; what the body reads has another one and is not ours to explain.
        if error.filename not in (None, str(partial)) or error.errno is None:
            raise
        raise UserError(
            f"{file}: cannot be written ({error.strerror}); make room or give another place."
        ) from error


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """An empty folder inside `folder`, for files that get their names later. It is removed at the end."""
    place = temporary(folder / "scratch")
    try:
        place.mkdir(parents=True)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


# ---- checks ---------------------------------------------------------------------------------------------------------


def _examined(
    folder: Path, maker: str, names: Sequence[str], working: Sequence[str], recognise: Recognise | None
) -> tuple[bool, list[str]]:
    """Whether the maker is new here, and which files an earlier version of it wrote; or the refusal."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file, not a folder; give another place.")
    ledger = _read(folder)
    new = not ledger.files(maker) if names else ledger.owner != maker
    old = _old_files(folder, names, recognise) if new else []
    if not names and ledger.owner not in (None, maker) and not is_empty(folder):
        raise UserError(f"{folder}: made by {ledger.owner}, not by {maker}; give another folder.")
    _check(Owned(folder, maker), ledger, names, () if new and not old else working, old)
    return new, old


def _check(
    owned: Owned, ledger: _Ledger, names: Sequence[str], working: Sequence[str], old: Sequence[str]
) -> None:
    folder, maker = owned.folder, owned.maker
    files = ledger.files(maker)
    for name in names or _names(folder):
        file = folder / name
        owned._inside(name)
        if not os.path.lexists(file) or name in old:
            continue
        if file.is_symlink() and file.is_dir() and not file.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{file}: a link that leads out of the folder; nothing is written through it.")
        if _matches(name, working):
            continue
        if not names and name in ledger.shared:
            continue
        if name not in files:
            raise UserError(
                f"{folder}: holds {name}, which {maker} did not make; nothing is overwritten, give another folder."
            )
        try:
            same = file.is_file() and _is_one_of(file, files[name])
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); give another folder.") from error
        if not same:
            raise UserError(
                f"{file}: changed since {maker} made it; nothing is overwritten, move it away or give another folder."
            )


def _old_files(folder: Path, names: Sequence[str], recognise: Recognise | None) -> list[str]:
    if recognise is None or not folder.is_dir():
        return []
    return [n for n in names or _names(folder) if (folder / n).is_file() and recognise(folder / n)]


def _names(folder: Path) -> Iterator[str]:
    """Relative names of all files below, and of links to folders, which are not followed."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        links = [f for f in folders if os.path.islink(os.path.join(place, f))]
        for name in sorted([*files, *links]):
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(place, name), folder)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


# ---- the ledger -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ledger:
    """Lines of a folder's ledger, oldest first: `{"maker", "folder": true}` for a claim, or a file's."""

    lines: list[dict[str, Any]]

    @property
    def owner(self) -> str | None:
        """Who claimed the whole folder last."""
        return next((line.get("maker") for line in reversed(self.lines) if line.get("folder")), None)

    @property
    def shared(self) -> set[str]:
        """Names that commands wrote here which never claimed the folder."""
        owners = {line.get("maker") for line in self.lines if line.get("folder")}
        return {
            str(line["name"]) for line in self.lines if "name" in line and line.get("maker") not in owners
        }

    def files(self, maker: str) -> dict[str, list[dict[str, Any]]]:
        """By name, every content that the maker gave the file: whichever is found, no user wrote it."""
        found: dict[str, list[dict[str, Any]]] = {}
        for line in self.lines:
            if line.get("maker") == maker and "name" in line:
                found.setdefault(line["name"], []).append(line)
        return found


def _read(folder: Path) -> _Ledger:
    try:
        with open(folder / LEDGER, "rb", opener=_no_link) as stream:
            content = stream.read()
    except (FileNotFoundError, NotADirectoryError):
        return _Ledger([])
    except OSError as error:
        raise UserError(f"{folder / LEDGER}: cannot be read ({error.strerror}).") from error
    lines = []
    for text in content.splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut short by a kill: the file it speaks of did not get its name
        if isinstance(line, dict) and all(isinstance(line.get(key, ""), str) for key in ("maker", "name")):
            lines.append(line)
    return _Ledger(lines)


def _note(folder: Path, line: dict[str, Any]) -> None:
    """Appends in one write. The line break before it keeps it apart from a line that was cut short."""
    try:
        with open(folder / LEDGER, "ab", buffering=0, opener=_no_link) as stream:
            stream.write(b"\n" + json.dumps(line).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror}); give another folder.") from error


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    found = file.stat()
    return {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "sha256": digest}


def _is_one_of(file: Path, known: Sequence[dict[str, Any]]) -> bool:
    """Size and time tell an untouched file without reading it; a copied folder has other times and is read."""
    found = file.stat()
    if any((found.st_size, found.st_mtime_ns) == (k.get("bytes"), k.get("mtime_ns")) for k in known):
        return True
    if all(found.st_size != k.get("bytes") for k in known):
        return False
    return _fingerprint(file)["sha256"] in [k.get("sha256") for k in known]
