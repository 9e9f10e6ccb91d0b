"""Extraction: split parts give every file back; everything that reaches out of the folder or grows is refused."""

import gzip
import os
import random
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.vision_opd_6k.archive import Bounds, extract, parts_of, safe_name
from vopd.errors import UserError

pytestmark = pytest.mark.slow

FILES = {"images/a.jpg": b"a" * 3000, "images/sub/b.jpg": b"b" * 70000, "c.jpg": b""}


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.fixture
def good(layout: ModuleType, tmp_path: Path) -> Path:
    members = [(member(name), content) for name, content in FILES.items()]
    return layout.archive_of(tmp_path / "good.tar.gz", members)


def everything_below(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("parts", [1, 2, 40])
def test_whole_or_in_parts_every_file_comes_out(
    good: Path, layout: ModuleType, tmp_path: Path, parts: int
) -> None:
    layout.split(good, parts)
    found = parts_of(tmp_path, "good.tar.gz")
    assert len(found) == parts
    names = list(extract(found, tmp_path / "out"))
    assert [str(n) for n in names] == list(FILES)
    assert everything_below(tmp_path / "out") == FILES


def test_an_archive_that_is_not_compressed_whatever_it_is_called(layout: ModuleType, tmp_path: Path) -> None:
    members = [(member(name), content) for name, content in FILES.items()]
    layout.split(layout.archive_of(tmp_path / "plain.tar.gz", members, "w"), 3)
    list(extract(parts_of(tmp_path, "plain.tar.gz"), tmp_path / "out"))
    assert everything_below(tmp_path / "out") == FILES


def test_parts_are_ordered_as_numbers(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"x.tar.gz.part{i}").touch()
    assert [f.name for f in parts_of(tmp_path, "x.tar.gz")] == [f"x.tar.gz.part{i}" for i in range(12)]
    (tmp_path / "x.tar.gz").touch()
    with pytest.raises(UserError, match="split parts of it as well"):
        parts_of(tmp_path, "x.tar.gz")
    with pytest.raises(UserError, match="neither this file nor its split parts"):
        parts_of(tmp_path, "y.tar.gz")


def test_a_second_extraction_writes_only_what_is_missing(good: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    list(extract([good], out))
    (out / "images/a.jpg").unlink()
    kept = (out / "images/sub/b.jpg").stat().st_mtime_ns
    list(extract([good], out))
    assert everything_below(out) == FILES
    assert (out / "images/sub/b.jpg").stat().st_mtime_ns == kept


def test_a_file_of_someone_is_not_replaced(good: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "images").mkdir(parents=True)
    (tmp_path / "out" / "images" / "a.jpg").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"images/a\.jpg is there already"):
        list(extract([good], tmp_path / "out"))
    assert (tmp_path / "out" / "images" / "a.jpg").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (member("/etc/evil.jpg"), "absolute path"),
        (member("../evil.jpg"), r"'\.\.'"),
        (member("images/../../evil.jpg"), r"'\.\.'"),
        (member("images\\..\\evil.jpg"), "no plain name"),
        (member("images/a\x1b[2J.jpg"), "hidden signs"),
        (member("images/a\n.jpg"), "hidden signs"),
        (member("images/gpj.\u202ea.exe"), "hidden signs"),
        (member("images/\udcff.jpg"), "no known encoding"),
        (member("first.jpg"), "occurred before"),
        (member("./first.jpg"), "occurred before"),
        (member("FIRST.jpg"), "occurred before"),
        (member("n" * 300), "too long"),
        (member("/".join("d" * 20)), "too deep"),
        (member("link.jpg", tarfile.SYMTYPE, "../../evil.jpg"), "a link"),
        (member("link.jpg", tarfile.SYMTYPE, "images/a.jpg"), "a link"),
        (member("link.jpg", tarfile.LNKTYPE, "../evil.jpg"), "a link"),
        (member("null", tarfile.CHRTYPE), "a device"),
        (member("disk", tarfile.BLKTYPE), "a device"),
        (member("pipe", tarfile.FIFOTYPE), "a pipe"),
    ],
    ids=lambda value: value.name[:24] if isinstance(value, tarfile.TarInfo) else None,
)
def test_what_reaches_out_is_refused(
    layout: ModuleType, tmp_path: Path, bad: tarfile.TarInfo, why: str
) -> None:
    archive = layout.archive_of(tmp_path / "bad.tar.gz", [(member("first.jpg"), b"1"), (bad, b"")])
    with pytest.raises(UserError, match=why) as caught:
        list(extract([archive], tmp_path / "in" / "out"))
    assert "bad.tar.gz" in str(caught.value)
    assert everything_below(tmp_path / "in") == {"out/first.jpg": b"1"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.tar.gz", "in"]


def test_a_link_in_the_folder_is_not_followed(good: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "images").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="through a link"):
        list(extract([good], tmp_path / "out"))
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("bounds", "why"),
    [
        (Bounds(members=2), "more than 2 members"),
        (Bounds(member_bytes=60000), "expands to 70000 bytes"),
        (Bounds(total_bytes=72000), "more than 72000 bytes in all"),
    ],
)
def test_bounds(good: Path, tmp_path: Path, bounds: Bounds, why: str) -> None:
    with pytest.raises(UserError, match=why):
        list(extract([good], tmp_path / "out", bounds))


def test_what_expands_out_of_proportion_is_refused(tmp_path: Path) -> None:
    """Each file within its bound, and all of them within theirs: the sum would still fill a disk."""
    info = member("0.jpg")
    info.size = 6 << 20
    with gzip.open(tmp_path / "bomb.tar.gz", "wb", compresslevel=1) as file:
        for number in range(2):
            info.name = f"{number}.jpg"
            file.write(info.tobuf())
            for _ in range(info.size >> 20):
                file.write(bytes(1 << 20))
    with pytest.raises(UserError, match=r"'1\.jpg': expands to more than 10 times"):
        list(extract([tmp_path / "bomb.tar.gz"], tmp_path / "out", Bounds(ratio=10)))


def test_an_archive_inside_stays_a_file(good: Path, layout: ModuleType, tmp_path: Path) -> None:
    inner = good.read_bytes()
    outer = layout.archive_of(tmp_path / "outer.tar.gz", [(member("inner.tar.gz"), inner)])
    list(extract([outer], tmp_path / "out"))
    assert everything_below(tmp_path / "out") == {"inner.tar.gz": inner}


@pytest.mark.parametrize("encrypted", [0, 1])
def test_a_zip_archive_is_no_archive_here(tmp_path: Path, encrypted: int) -> None:
    with zipfile.ZipFile(tmp_path / "x.tar.gz", "w") as file:
        file.writestr("../a.jpg", b"a")
        file.filelist[0].flag_bits |= encrypted
    with pytest.raises(UserError, match="damaged"):
        list(extract([tmp_path / "x.tar.gz"], tmp_path / "out"))


def bomb(path: Path, header: bytes, zeros: int) -> Path:
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(header)
        for _ in range(zeros >> 20):
            file.write(bytes(1 << 20))
    return path


def test_a_bomb_is_refused_before_it_expands(tmp_path: Path) -> None:
    info = member("bomb.jpg")
    info.size = 300 << 20
    archive = bomb(tmp_path / "bomb.tar.gz", info.tobuf(), info.size)
    assert archive.stat().st_size < 1 << 20
    with pytest.raises(UserError, match="expands to"):
        list(extract([archive], tmp_path / "out"))
    assert everything_below(tmp_path / "out") == {}


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
def test_a_header_bomb_does_not_reach_memory(tmp_path: Path, kind: bytes) -> None:
    info = member("headers", kind)
    info.size = 100 << 20
    archive = bomb(tmp_path / "bomb.tar.gz", info.tobuf(), info.size)
    tracemalloc.start()
    with pytest.raises(UserError, match="headers longer"):
        list(extract([archive], tmp_path / "out"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_memory_does_not_hold_the_archive(layout: ModuleType, tmp_path: Path) -> None:
    noise = random.Random(0).randbytes(1 << 20)
    archive = layout.archive_of(tmp_path / "x.tar.gz", [(member(f"{i}.jpg"), noise) for i in range(24)])
    layout.split(archive, 5)
    tracemalloc.start()
    assert sum(1 for _ in extract(parts_of(tmp_path, "x.tar.gz"), tmp_path / "out")) == 24
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_a_damaged_archive_is_named(good: Path, tmp_path: Path, keep: float) -> None:
    content = good.read_bytes()
    good.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(UserError, match=r"good\.tar\.gz: damaged or cut short"):
        list(extract([good], tmp_path / "out"))


def test_a_wrong_checksum_is_seen(good: Path, tmp_path: Path) -> None:
    content = bytearray(good.read_bytes())
    content[-8] ^= 1
    good.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        list(extract([good], tmp_path / "out"))


def test_no_archive_at_all(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"hello")
    with pytest.raises(UserError, match="damaged"):
        list(extract([tmp_path / "x.tar.gz"], tmp_path / "out"))


@given(st.text(max_size=40) | st.text("./\\ab\0", max_size=12))
def test_a_safe_name_stays_below(name: str) -> None:
    try:
        path = safe_name(name)
    except (ValueError, UnicodeEncodeError):
        return
    assert not path.is_absolute()
    assert os.path.normpath(f"/root-of/x/{path}").startswith("/root-of/x")
