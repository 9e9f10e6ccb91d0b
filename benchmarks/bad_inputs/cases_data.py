"""Data that cannot be trained on, and places that belong to someone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.bad_inputs import Case
from data import schema
from data.miniature import prepare

Row = dict[str, Any]
TYPES = schema.FEATURES.arrow_schema


def _rows() -> list[Row]:
    return list(prepare.rows("train", 3, 0))


def _write(folder: Path, table: pa.Table, **how: Any) -> Path:
    place = folder / "set"
    place.mkdir(exist_ok=True)
    pq.write_table(table, place / "train.parquet", **how)
    return place


def _set(folder: Path, **changed: Any) -> Path:
    """A set whose second row has other values."""
    rows = _rows()
    rows[1] |= changed
    return _write(folder, pa.Table.from_pylist(rows, schema=TYPES))


def _columns(folder: Path, change: Callable[[pa.Table], pa.Table]) -> Path:
    """A set whose table is another one."""
    return _write(folder, change(pa.Table.from_pylist(_rows(), schema=TYPES)))


def _column(name: str, values: list[Any], kind: pa.DataType) -> Callable[[Path], list[str]]:
    """A set with a column of another type. values: its three values, where None stands for the usual one."""

    def changed(table: pa.Table) -> pa.Table:
        mixed = [
            old if new is None else new for old, new in zip(table[name].to_pylist(), values, strict=True)
        ]
        return table.set_column(table.schema.get_field_index(name), name, pa.array(mixed, kind))

    return lambda folder: [str(_columns(folder, changed))]


def _nothing(table: pa.Table) -> pa.Table:
    return table.set_column(table.schema.get_field_index("licence"), "licence", pa.nulls(len(table)))


def _bad_row(kind: str, says: str, **changed: Any) -> Case:
    return Case(kind, "data.validate", lambda folder: [str(_set(folder, **changed))], says)


def _bad_file(kind: str, says: str, arguments: Callable[[Path], list[str]]) -> Case:
    return Case(kind, "data.validate", arguments, says)


def _raw(content: bytes) -> Callable[[Path], list[str]]:
    def arguments(folder: Path) -> list[str]:
        (folder / "set").mkdir()
        (folder / "set" / "train.parquet").write_bytes(content)
        return [str(folder / "set")]

    return arguments


def _cut(folder: Path, keep: Callable[[bytes], bytes]) -> list[str]:
    place = _set(folder)
    file = place / "train.parquet"
    file.write_bytes(keep(file.read_bytes()))
    return [str(place)]


def _middle_lost(content: bytes) -> bytes:
    return content[:4] + b"\0" * 2000 + content[2004:]


def _mine(folder: Path, name: str, text: str = "mine") -> Path:
    """A folder that holds a file of someone."""
    place = folder / "mine"
    place.mkdir()
    (place / name).write_text(text)
    return place


def _synthesis(folder: Path) -> list[str]:
    (folder / "pictures").mkdir()
    return [
        f"images={folder / 'pictures'}", f"out={_mine(folder, 'train.parquet')}", "source=s", "licence=l",
        "server.base_url=http://localhost:1/v1", "server.model=m",
    ]  # fmt: skip


def _run_on(folder: Path) -> list[str]:
    arguments = [f"run_dir={folder / 'run'}", f"data.folder={_set(folder)}"]
    return ["vision_opd", *arguments, "hardware.memory_gib=0.01", "hardware.disk_gib=0.01"]


def _dangling(folder: Path) -> list[str]:
    (folder / "eyes.py").symlink_to(folder / "elsewhere.py")
    return ["eyes", "--out", str(folder)]


ID = "train-0-000001"

CASES = (
    # ---- a row
    _bad_row("null option", "number 2 is null", options=["1", None, "3", "4"]),
    _bad_row("empty option", "number 1 is empty", options=["", "2", "3", "4"]),
    _bad_row("more options than letters", "27 options, and 26 letters", options=[str(n) for n in range(27)]),
    _bad_row("option twice", "'2' is there twice", options=["1", "2", "2 ", "4"]),
    _bad_row("answer beyond the options", "'E' is not the letter", answer="E"),
    _bad_row("answer not yes or no", "'maybe' is not of type 'yes/no'", answer="maybe", answer_type="yes/no"),
    _bad_row("answer no number", "'a few' is not of type 'number'", answer="a few", answer_type="number"),
    _bad_row("unknown answer type", "answer_type 'essay' is not one of", answer_type="essay"),
    _bad_row("split column of another split", "split is 'test' in a file of 'train'", split="test"),
    _bad_row("box with a null", f"train {ID}: box", box=[1, None, 3, 4]),
    _bad_row("box outside the image", f"train {ID}: box: [100, 100, 140, 110]", box=[100, 100, 140, 110]),
    _bad_row("empty id", "train row 1: schema: id is empty", id=""),
    _bad_row("null id", "train row 1: schema: column 'id' is empty", id=None),
    _bad_row("id with a control character", "holds control characters", id="a\x1b[2Jb"),
    _bad_row("hint not in the question", "hint is not part of the question", hint="Elsewhere."),
    _bad_row("image path out of the folder", "without '..'", image={"bytes": None, "path": "../../secret.png"}),
    _bad_row("absolute image path", "is not a path inside", image={"bytes": None, "path": "/etc/hostname"}),
    _bad_row("image that is text", "unreadable: image", image={"bytes": b"hello", "path": None}),
    _bad_row("text without end", "more than 1000000 characters", question="a" * 1_000_001),
    # ---- a column or file
    _bad_file("box with a NaN", f"train {ID}: box", _column(
        "box", [None, [1.0, float("nan"), 3, 4], None], pa.list_(pa.float64()))),
    _bad_file("box of three numbers", f"train {ID}: box", _column(
        "box", [None, [1, 2, 3], None], pa.list_(pa.int64()))),
    _bad_file("text that is not UTF-8", f"train {ID}: schema: question is not string", _column(
        "question", [None, b"\xff\xfe", None], pa.binary())),
    _bad_file("column of structs for text", "column 'question' is not string but struct", _column(
        "question", [{"a": 1}] * 3, pa.struct([("a", pa.int64())]))),
    _bad_file("column of numbers for text", "column 'answer' is not string but double", _column(
        "answer", [1.5] * 3, pa.float64())),
    _bad_file("text for options", "column 'options' is not list", _column("options", ["A, B"] * 3, pa.string())),
    _bad_file("images that are bare bytes", "column 'image' is not struct", _column(
        "image", [b"x"] * 3, pa.binary())),
    _bad_file("column of nulls", "column 'licence' is empty", lambda folder: [str(_columns(folder, _nothing))]),
    _bad_file("column twice", "2 columns called 'hint'", lambda folder: [str(_columns(
        folder, lambda t: t.append_column("hint", t["hint"])))]),
    _bad_file("column missing", "no column 'family'", lambda folder: [str(_columns(
        folder, lambda t: t.drop_columns(["family"])))]),
    _bad_file("data set without rows", "holds no rows", lambda folder: [str(_columns(folder, lambda t: t[:0]))]),
    _bad_file("file that is not Parquet", "not a parquet file that can be read", _raw(b"hello" * 100)),
    _bad_file("empty parquet file", "not a parquet file that can be read", _raw(b"")),
    _bad_file("encrypted parquet file", "train.parquet: not a parquet file that can be read", _raw(
        b"PARE" + b"\0" * 60 + b"\x08\0\0\0PARE")),
    _bad_file("parquet file cut short", "not a parquet file that can be read", lambda folder: _cut(
        folder, lambda content: content[: len(content) // 2])),
    _bad_file("parquet file damaged inside", "row group 0 cannot be read", lambda folder: _cut(
        folder, _middle_lost)),
    _bad_file("folder without data", "holds no parquet file", lambda folder: [str(folder)]),
    _bad_file("shard missing", "shards are not 2 files", lambda folder: [str(
        (_set(folder) / "train.parquet").rename(folder / "set" / "train-00001-of-00002.parquet").parent)]),
    _bad_file("validated.json of someone", "not a stamp of data.validate; move it away", lambda folder: [str(
        (_set(folder) / "validated.json").write_text("mine") and folder / "set")]),
    # ---- places that belong to someone
    Case("run over a set of someone", "vopd.runner.run", _run_on, "run `vopd data validate"),
    Case("miniature over a set of someone", "data.miniature.prepare", lambda folder: ["--out", str(_set(folder))],
         "holds train.parquet, which data.miniature.prepare did not make"),
    Case("published set over a folder of someone", "data.vision_opd_6k.prepare", lambda folder: [
        "--out", str(_mine(folder, "train.parquet")), "--source", str(folder)],
         "holds train.parquet, which data.vision_opd_6k.prepare did not make"),
    Case("synthesis into a folder of someone", "data.synthesize", _synthesis,
         "holds train.parquet, which data.synthesize did not make"),
    Case("ceiling over a file of someone", "data.miniature.ceiling", lambda folder: [
        "--out", str(_mine(folder, "results.json") / "results.json")], "is not a result of data.miniature.ceiling"),
    Case("quarantine into the set itself", "data.validate", lambda folder: [
        str(_set(folder)), "--quarantine", str(folder / "set" / "good")], "give --quarantine another folder"),
    Case("quarantine into a folder of someone", "data.validate", lambda folder: [
        str(_set(folder)), "--quarantine", str(_mine(folder, "thesis.tex"))], "holds thesis.tex, which"),
    Case("audit over a file of someone", "data.audit", lambda folder: [
        "a.parquet", "b.parquet", "--out", str(_mine(folder, "excluded.json"))], "holds excluded.json, which"),
    Case("report over a file of someone", "vopd.report.__main__", lambda folder: [
        str(folder), f"out={_mine(folder, 'table.md')}"], "holds table.md, which vopd.report did not make"),
    Case("recipe over a link", "vopd.runner.new_recipe", _dangling, "eyes.py exists"),
)  # fmt: skip
