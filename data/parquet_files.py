"""Reads parquet files from anyone: few rows in memory at a time, whatever the types, no traceback.

A column may come as any type that holds the wanted values without loss (large strings, dictionaries, wider integers,
null columns); other types are refused by the column's name. A value that does not fit (text that is not UTF-8, a box of
three numbers or with a NaN) is that row's problem: the row is given without it, and with the reason.

Parquet is decoded page by page, and a page can hold a thousand rows: the largest that the file's footer allows is
compared with the memory there is before anything is read. Cut short, encrypted and otherwise unreadable files end in a
sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vopd.common import environment_checks
from vopd.errors import UserError

BATCH_BYTES = 32 * 2**20
MOST_ROWS = 16
READ_BYTES = 2**20
ROWS_A_PAGE = 1024
"""Writers that follow the reference implementation end a page after this many rows at the latest."""
MOST_PAGE_BYTES = 2**31
"""Of the format: a page's size is a signed 32-bit number."""


class Row(dict[str, Any]):
    """A row by column; `problems` are (column, reason) of values that could not be read and are None here."""

    problems: tuple[tuple[str, str], ...] = ()


def opened(file: Path, wanted: pa.Schema) -> pq.ParquetFile:
    """The file, which has every column of `wanted` once and in a type that can become the wanted one.

    Raises:
        UserError: it is not a parquet file that can be read here, or lacks a column; names the column.
    """
    try:
        source = pq.ParquetFile(file, buffer_size=READ_BYTES, pre_buffer=False)
        columns = source.schema_arrow
    except (pa.ArrowException, OSError, ValueError) as error:
        why = "it is encrypted" if "encrypt" in str(error).lower() else _first_line(error)
        raise UserError(f"{file}: not a parquet file that can be read ({why}); write it again.") from error
    for field in wanted:
        count = columns.names.count(field.name)
        if count != 1:
            what = "no column" if count == 0 else f"{count} columns called"
            raise UserError(
                f"{file}: {what} {field.name!r}; the columns of data/schema.py are needed once each."
            )
        if not _fits(columns.field(field.name).type, field.type):
            raise UserError(
                f"{file}: column {field.name!r} is not {field.type} but {columns.field(field.name).type}; "
                "write it as that type."
            )
    return source


def rows(
    source: pq.ParquetFile, file: Path, wanted: pa.Schema, groups: Sequence[int] | None = None
) -> Iterator[Row]:
    """The rows of an opened file (of these row groups), with the columns and types of `wanted`.

    Raises:
        UserError: a row group that does not fit into memory, or a file that is damaged further on.
    """
    leaves = _leaves(source.schema_arrow, wanted)
    for number in range(source.metadata.num_row_groups) if groups is None else groups:
        size = _batch_size(source, file, number, leaves)
        try:
            for batch in source.iter_batches(batch_size=size, row_groups=[number], columns=leaves):
                yield from _read(batch, wanted)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f"{file}: row group {number} cannot be read ({_first_line(error)}); write the file again."
            ) from error


# ---- types ----------------------------------------------------------------------------------------------------------


def _fits(given: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether values of one type can become the other without loss, if they themselves allow it."""
    if isinstance(given, pa.BaseExtensionType):
        given = given.storage_type
    if pa.types.is_dictionary(given):
        given = given.value_type
    if given == wanted or pa.types.is_null(given):
        return True
    if pa.types.is_struct(wanted):
        names = [field.name for field in given] if pa.types.is_struct(given) else []
        there = [f for f in wanted if f.name in names]
        return bool(there) and all(
            names.count(f.name) == 1 and _fits(given.field(f.name).type, f.type) for f in there
        )
    if _is_list(wanted):
        return _is_list(given) and _fits(given.value_type, wanted.value_type)
    if pa.types.is_integer(wanted):
        return bool(pa.types.is_integer(given) or pa.types.is_floating(given))
    if pa.types.is_string(wanted):
        return _is_text(given) or bool(pa.types.is_integer(given))
    return pa.types.is_binary(wanted) and _is_text(given)


def _is_list(given: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(given) or pa.types.is_large_list(given) or pa.types.is_fixed_size_list(given)
    )


def _is_text(given: pa.DataType) -> bool:
    tests = (
        "string",
        "large_string",
        "string_view",
        "binary",
        "large_binary",
        "binary_view",
        "fixed_size_binary",
    )
    return any(getattr(pa.types, f"is_{name}")(given) for name in tests)


def _leaves(columns: pa.Schema, wanted: pa.Schema) -> list[str]:
    """What to read: of a struct the fields that are wanted, so that paths can be read without the images' bytes."""
    names = []
    for field in wanted:
        given = columns.field(field.name).type
        given = given.storage_type if isinstance(given, pa.BaseExtensionType) else given
        if pa.types.is_struct(given):
            names += [f"{field.name}.{f.name}" for f in field.type if given.get_field_index(f.name) >= 0]
        else:
            names.append(field.name)
    return names


# ---- values ---------------------------------------------------------------------------------------------------------


def _read(batch: pa.RecordBatch, wanted: pa.Schema) -> list[Row]:
    found = [Row() for _ in range(len(batch))]
    for field in wanted:
        array = batch.column(batch.schema.get_field_index(field.name))
        try:
            values = _values(array, field.type)
        except (pa.ArrowException, ValueError, OverflowError):
            values = [_value(array, i, field, found[i]) for i in range(len(array))]
        for row, value in zip(found, values, strict=True):
            row[field.name] = value
    return found


def _values(array: pa.Array, wanted: pa.DataType) -> list[Any]:
    """Python values of the wanted type; raises where one does not fit."""
    array = _plain(array)
    if pa.types.is_null(array.type):
        return [None] * len(array)
    if array.type != wanted:
        array = array.cast(wanted)
    array.validate(full=True)
    return list(array.to_pylist())


def _value(array: pa.Array, index: int, field: pa.Field, row: Row) -> Any:
    try:
        return _values(array.take(pa.array([index])), field.type)[0]
    except (pa.ArrowException, ValueError, OverflowError) as error:
        row.problems = (*row.problems, (field.name, f"is not {field.type} ({_first_line(error)[:200]})"))
        return None


def _plain(array: pa.Array) -> pa.Array:
    if isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


# ---- memory ---------------------------------------------------------------------------------------------------------


def _batch_size(source: pq.ParquetFile, file: Path, number: int, leaves: Sequence[str]) -> int:
    """Rows to read at once. `UserError` if decoding a page of the row group could take more memory than there is."""
    group = source.metadata.row_group(number)
    chunks = [group.column(i) for i in range(group.num_columns)]
    sizes = [c.total_uncompressed_size for c in chunks if _is_read(c.path_in_schema, leaves)]
    count = max(1, group.num_rows)
    pages = [min(MOST_PAGE_BYTES, size * min(1, ROWS_A_PAGE / count)) for size in sizes]
    # Columns are decoded together; a page is there compressed and decompressed, beside the rows that are handed out.
    if (
        sum(pages) > BATCH_BYTES
        and 2 * sum(pages) + BATCH_BYTES > environment_checks.available_memory_gib() * 2**30
    ):
        raise UserError(
            f"{file}: row group {number} has {sum(sizes) / 2**30:.1f} GiB in {group.num_rows} rows, which do not fit "
            "into memory; write smaller row groups (`pyarrow.parquet.write_table(..., row_group_size=64)`)."
        )
    a_row = max(1, sum(sizes) // count)
    return max(1, min(MOST_ROWS, BATCH_BYTES // a_row))


def _is_read(path: str, leaves: Sequence[str]) -> bool:
    return any(path == leaf or path.startswith(f"{leaf}.") for leaf in leaves)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
