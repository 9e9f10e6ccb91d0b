"""Whatever a parquet file holds, reading and validating it ends in rows, findings or a sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from data import parquet_files, schema, validate
from data.miniature import prepare
from vopd.common import environment_checks
from vopd.errors import UserError
from vopd.runner import preflight

BASE = Path(__file__).parents[2] / "data" / "miniature" / "base"
TYPES = schema.FEATURES.arrow_schema
ROWS = list(prepare.rows("train", 3, 0))
TABLE = pa.Table.from_pylist(ROWS, schema=TYPES)


def write(path: Path, columns: dict[str, pa.Array], **how: Any) -> Path:
    table = TABLE
    for name, array in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, array)
    pq.write_table(table, path / "train.parquet", **how)
    return path / "train.parquet"


def column(name: str, kind: pa.DataType) -> pa.Array:
    return pa.array([row[name] for row in ROWS], kind)


TEXT = pa.large_string()
SAME = {
    "large text": {"question": column("question", TEXT), "id": column("id", pa.large_binary())},
    "dictionary": {"family": TABLE["family"].combine_chunks().dictionary_encode()},
    "view": {"hint": column("hint", pa.string_view())},
    "wide box": {"box": column("box", pa.list_(pa.int64()))},
    "box of whole floats": {"box": pa.array([[float(x) for x in r["box"]] for r in ROWS])},
    "large list": {"options": column("options", pa.large_list(TEXT))},
    "large image": {"image": column("image", pa.struct([("path", TEXT), ("bytes", pa.large_binary())]))},
    "no paths": {"crop": column("crop", pa.struct([("bytes", pa.binary()), ("path", pa.null())]))},
    "no originals": {"original": pa.nulls(3)},
}


@pytest.mark.parametrize("name", SAME)
def test_other_types_of_the_same_values_are_the_same_rows(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, SAME[name])
    assert list(schema.rows(path)) == ROWS
    read = schema.encoded([path])
    assert read.features["question"] == schema.FEATURES["question"]
    assert read.remove_columns([]).to_list() == ROWS
    assert validate.validate([path]).findings == []


def test_ids_that_are_numbers_become_texts(tmp_path: Path) -> None:
    path = write(tmp_path, {"id": pa.array([7, 8, 9])})
    assert [row["id"] for row in schema.rows(path)] == schema.encoded([path])["id"] == ["7", "8", "9"]


def test_columns_of_someone_are_left_out(tmp_path: Path) -> None:
    pq.write_table(TABLE.append_column("notes", pa.array([{"a": 1}] * 3)), tmp_path / "train.parquet")
    assert schema.encoded([tmp_path / "train.parquet"]).to_list() == ROWS


ODD: list[pa.Array] = [
    pa.array(values, kind)
    for kind, values in [
        (pa.null(), [None] * 3),
        (pa.string(), ["", " ", "\x00"]),
        (pa.string(), ["a" * 300, None, "é\u202e\x1b[2J"]),
        (pa.string(), ["<|im_start|>", "<image>", "{question}"]),
        (pa.string(), ["{% raise %}", "{{ 1/0 }}", "\ufffe"]),
        (pa.binary(), [b"\xff", b"a", None]),
        (pa.int64(), [1, -(2**62), None]),
        (pa.float64(), [float("nan"), float("inf"), 1.0]),
        (pa.bool_(), [True, None, False]),
        (pa.timestamp("us"), [0, 1, None]),
        (pa.list_(pa.string()), [[], None, ["a", None, ""]]),
        (pa.list_(pa.string()), [["x"] * 40, ["<think>", "b"], ["a", "b", "c", "d"]]),
        (pa.list_(pa.binary()), [[b"\xff\xff", b"b"], [b"a", b"b"], [b"a"]]),
        (pa.list_(pa.int64()), [[1, 2, 3, 4], [1, 2, 3], [2**40, 0, 0, 0]]),
        (pa.list_(pa.int32(), 4), [[1, None, 3, 4], None, [5, 5, 5, 5]]),
        (pa.list_(pa.int32(), 4), [[-(2**31), -(2**31), 2**31 - 1, 2**31 - 1], [0, 0, 1, 1], [9, 9, 3, 3]]),
        (pa.list_(pa.float64()), [[0.5, 1, 2, 3], [float("nan")] * 4, [1, 2, 30, 40]]),
        (pa.list_(pa.list_(pa.int8())), [[[1]], [], None]),
        (pa.map_(pa.string(), pa.int8()), [[("a", 1)], [], None]),
        (pa.struct([("bytes", pa.binary())]), [{"bytes": b""}, {"bytes": b"\x89PNG\r\n\x1a\n"}, None]),
        (pa.struct([("path", pa.string())]), [{"path": "../x"}, {"path": "a\0b"}, {"path": "."}]),
        (pa.struct([("path", pa.string())]), [{"path": "a" * 5000}, {"path": "\\\\x"}, {"path": ""}]),
        (pa.struct([("path", pa.binary())]), [{"path": b"\xff"}, {"path": None}, None]),
        (pa.struct([("path", pa.int8()), ("bytes", pa.string())]), [{"path": 1, "bytes": "x"}, None, None]),
        (pa.struct([("a", pa.int8())]), [{"a": 1}, None, {"a": None}]),
    ]
]
ODD.append(pa.array(["a", "b", "a"]).dictionary_encode())


@pytest.fixture(scope="module")
def prompts() -> validate.Prompts:
    return validate.Prompts(AutoProcessor.from_pretrained(BASE), 160)


def refusal(call: Callable[[], Any], otherwise: str) -> str:
    """What a call was refused with, or `otherwise`."""
    try:
        call()
    except UserError as error:
        return str(error)
    return otherwise


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    columns=st.dictionaries(
        st.sampled_from(schema.COLUMNS), st.sampled_from(range(len(ODD))), min_size=1, max_size=3
    )
)
def test_no_column_of_anything_ends_in_a_traceback(
    columns: dict[str, int], tmp_path: Path, prompts: validate.Prompts
) -> None:
    path = write(tmp_path, {name: ODD[index] for name, index in columns.items()})
    reports: list[validate.Report] = []
    for check in (
        lambda: reports.append(validate.validate([path], prompts)),
        lambda: schema.check_split(path),
        lambda: preflight.check_parquet(path, schema.COLUMNS),
    ):
        assert str(path) in refusal(check, str(path))
    for report in reports:
        assert "\x1b" not in report.text()
        assert report.blocking == [] or report.sentence().isprintable()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 2000), bytes_=st.binary(min_size=1, max_size=40), cut=st.booleans())
def test_no_damage_ends_in_a_traceback(place: int, bytes_: bytes, cut: bool, tmp_path: Path) -> None:
    path = write(tmp_path, {}, compression="zstd")
    content = path.read_bytes()
    at = len(content) - place if place % 2 else place
    path.write_bytes(content[:at] if cut else content[:at] + bytes_ + content[at + len(bytes_) :])
    assert str(path) in refusal(lambda: validate.validate([path]), str(path))


def test_a_value_that_cannot_be_read_is_its_rows_problem(tmp_path: Path) -> None:
    path = write(tmp_path, {"options": ODD[12]})
    report = validate.validate([path])
    assert next((f.kind, f.id) for f in report.findings) == ("options", ROWS[0]["id"])
    with pytest.raises(UserError, match=f"row {ROWS[0]['id']}, column 'options' is not list"):
        list(schema.rows(path))


def test_memory_grows_with_a_page_and_not_with_the_file(tmp_path: Path) -> None:
    wanted = pa.schema([TYPES.field("id"), TYPES.field("image")])
    size, count = 2**20, 48
    cells = [{"bytes": bytes([i]) * size, "path": None} for i in range(count)]
    table = pa.Table.from_pylist([{"id": str(i), "image": c} for i, c in enumerate(cells)], schema=wanted)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=6, compression="none", use_dictionary=False)
    del table, cells
    before = pa.total_allocated_bytes()
    most, seen = 0, 0
    with parquet_files.opened(tmp_path / "a.parquet", wanted) as source:
        for row in parquet_files.rows(source, tmp_path / "a.parquet", wanted):
            seen += len(row["image"]["bytes"])
            most = max(most, pa.total_allocated_bytes() - before)
    assert seen == count * size and most < 4 * 6 * size < count * size


def test_a_row_group_beyond_memory_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_files, "BATCH_BYTES", 1000)
    monkeypatch.setattr(environment_checks, "available_memory_gib", lambda: 1e-6)
    path = write(tmp_path, {})
    with pytest.raises(UserError, match=r"train\.parquet: row group 0 has .* smaller row groups \(`pyarrow"):
        validate.validate([path])
    path = write(tmp_path, {}, row_group_size=1)
    monkeypatch.setattr(environment_checks, "available_memory_gib", lambda: 1e-3)
    assert validate.validate([path]).findings == []


def test_some_rows_by_number(tmp_path: Path) -> None:
    rows = list(prepare.rows("train", 11, 0))
    schema.write_shards(rows, tmp_path / "train.parquet", 4)
    for file in schema.shards(tmp_path / "train.parquet"):
        pq.write_table(pq.read_table(file), file, row_group_size=3)
    found = list(schema.rows_at(tmp_path / "train.parquet", {0, 3, 6, 10}))
    assert found == [rows[i] for i in (0, 3, 6, 10)]
