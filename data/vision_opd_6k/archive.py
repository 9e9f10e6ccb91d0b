"""Extracts a tar archive, gzipped or plain, whole or in split parts, from an untrusted source.

The parts are read one after the other into decompression and tar parsing; nothing is joined on disk or in memory.
`tarfile`'s own extraction is not used: its filters have had holes. Only regular files are written, by us, under names
checked here; every link, device or other kind, an absolute name, `..`, hidden signs, and a name that was there before
(also in other letters of case) are refused. What may come out of the archive is bounded: members, bytes of one member,
bytes in all and for each byte that is read, and bytes between two members (headers of any length would otherwise be
read into memory). An archive inside is a file like any other.
"""

import gzip
import io
import os
import re
import tarfile
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from vopd.common import ownership
from vopd.common.terminal import HIDDEN
from vopd.errors import UserError

BLOCK = 1 << 20
_BUFFER = 1 << 16  # tarfile reads a stream in pieces of this size; its own 10 KiB take three times as long
_HEADERS = 1 << 16


@dataclass(frozen=True)
class Bounds:
    """What an archive may hold. The published sets are far below."""

    members: int = 200_000
    member_bytes: int = 128 * 2**20
    total_bytes: int = 200 * 2**30
    ratio: int = 100  # pictures are compressed already; the first MiB of a tiny archive is free


def parts_of(folder: Path, name: str) -> list[Path]:
    """The file `name`, or its split parts (`name` and more behind it) in order.

    Parts are ordered as numbers where they are numbered: part2 comes before part10. `UserError` if there is none, or a
    whole file and parts.
    """
    whole, parts = folder / name, [f for f in folder.glob(f"{name}?*") if f.is_file()]
    if whole.is_file() and parts:
        raise UserError(
            f"{whole}: there are split parts of it as well ({parts[0].name}); keep one or the other."
        )
    found = [whole] if whole.is_file() else parts
    if not found:
        raise UserError(f"{whole}: neither this file nor its split parts exist.")
    return sorted(found, key=lambda f: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", f.name)])


class _Chained(io.RawIOBase):
    """Files read one after the other as one."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._rest = list(files)
        self._file: BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        while True:
            if self._file is None:
                if not self._rest:
                    return 0
                self._file = self._rest.pop(0).open("rb")
            count = self._file.readinto(buffer)  # type: ignore[attr-defined]
            if count:
                return int(count)
            self._file.close()
            self._file = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


class _Metered:
    """A decompressed stream that gives no more bytes than were allowed."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream, self._name, self._left = stream, name, 0

    def allow(self, count: int) -> None:
        """From now on, this many bytes more (tarfile reads ahead by less than one buffer)."""
        self._left = count + _HEADERS + _BUFFER

    def read(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise UserError(
                f"{self._name}: headers longer than {_HEADERS} bytes; the archive is not extracted."
            )
        return self._stream.read(size)


def extract(parts: Sequence[Path], target: Path, bounds: Bounds | None = None) -> Iterator[PurePosixPath]:
    """Writes every file of the archive below `target` and yields its name. Files that are there in their size are kept.

    Raises:
        UserError: the archive is damaged or cut short, breaks a bound, or holds what is refused; names the member.
    """
    bounds, label = bounds or Bounds(), parts[0].name
    target.mkdir(parents=True, exist_ok=True)
    total, packed, seen = 0, sum(part.stat().st_size for part in parts), set[int]()
    with _Chained(parts) as raw, _unzipped(io.BufferedReader(raw, BLOCK)) as stream:
        metered = _Metered(stream, label)
        metered.allow(0)
        try:
            with tarfile.open(fileobj=metered, mode="r|", bufsize=_BUFFER) as tar:  # type: ignore[call-overload]
                for count, member in enumerate(tar, 1):
                    tar.members.clear()  # tarfile keeps every header: memory would grow with members
                    total += max(member.size, 0)
                    _check_bounds(label, member, count, total, packed, bounds)
                    metered.allow(member.size)
                    if not member.isdir():
                        _check_new(label, member.name, seen)
                        yield _write(tar, member, target, label)
            metered.allow(BLOCK)
            while metered.read(_BUFFER):  # to the end, where the checksum is
                pass
        except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
            raise UserError(f"{label}: damaged or cut short ({error}); fetch it again.") from error


def _unzipped(packed: io.BufferedReader) -> BinaryIO:
    """The stream decompressed; one that is not gzip, whatever its file is called, as it is."""
    return gzip.GzipFile(fileobj=packed) if packed.peek(2)[:2] == b"\x1f\x8b" else packed  # type: ignore[return-value]


def _check_bounds(
    label: str, member: tarfile.TarInfo, count: int, total: int, packed: int, bounds: Bounds
) -> None:
    where = f"{label}: {member.name!r}"
    if count > bounds.members:
        raise UserError(f"{where}: more than {bounds.members} members; the archive is not extracted further.")
    if member.size > bounds.member_bytes:
        raise UserError(f"{where}: expands to {member.size} bytes, more than {bounds.member_bytes}.")
    if total > bounds.total_bytes:
        raise UserError(f"{where}: expands to more than {bounds.total_bytes} bytes in all.")
    if total > bounds.ratio * max(packed, 2**20):
        raise UserError(f"{where}: expands to more than {bounds.ratio} times the archive's {packed} bytes.")


def _check_new(label: str, name: str, seen: set[int]) -> None:
    """Refuse a second member of a name; `seen` holds hashes, for names alone would fill the memory."""
    key = hash(unicodedata.normalize("NFC", os.path.normpath(name)).casefold())
    if key in seen:
        raise UserError(
            f"{label}: {name!r}: a name that occurred before, perhaps in another case; the archive is not "
            "extracted further."
        )
    seen.add(key)


def safe_name(name: str) -> PurePosixPath:
    """The member's name as a relative path; `ValueError` if it is absolute, climbs with `..`, or is not plain."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError("an absolute path, '..', or no plain name")
    if any(len(part.encode(errors="surrogateescape")) > 200 for part in path.parts) or len(path.parts) > 16:
        raise ValueError("too long or too deep a name")
    if any(unicodedata.category(sign) in HIDDEN for sign in name):
        raise ValueError("a name with hidden signs or in no known encoding")
    return path


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path, label: str) -> PurePosixPath:
    def refused(why: str) -> UserError:
        return UserError(f"{label}: {member.name!r}: {why}; the archive is not extracted further.")

    if not member.isreg() or member.issparse():
        kind = "a link" if member.issym() or member.islnk() else "no regular file (a device, a pipe, ...)"
        raise refused(kind)
    try:
        name = safe_name(member.name)
    except ValueError as error:
        raise refused(str(error)) from error
    file = target / name
    # No link comes from the archive, but one may be in the folder already.
    if not file.parent.resolve().is_relative_to(target.resolve()) or file.is_symlink():
        raise refused("leads through a link out of the folder")
    if file.exists():
        if file.is_file() and file.stat().st_size == member.size:
            return name
        raise refused(f"{file} is there already and is not this file; move it away")
    content = tar.extractfile(member)
    assert content is not None  # a regular file has content
    with ownership.atomic(file) as part:
        with part.open("xb") as out:
            while block := content.read(BLOCK):
                out.write(block)
        if part.stat().st_size != member.size:
            raise refused("is cut short")
    return name
