"""Checks of a run's splits and settings before Ray starts: a mistake costs a second and one sentence.

Each check takes what it judges and raises `UserError` (exit code 2) naming the file, row or key, or returns nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from data import schema
from vopd.errors import UserError

MASKED_ATTENTION = ("sdpa", "eager")
PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def check_attention(packed: bool, attention: str) -> None:
    """Padded rows share one copy of a prompt by a mask per row, which not every implementation of attention takes.

    Raises:
        UserError: another implementation without packing, or one whose package is not installed.
    """
    if not packed and attention not in MASKED_ATTENTION:
        raise UserError(
            f"model.attention={attention} cannot be used with train.packed=false; take "
            f"{' or '.join(MASKED_ATTENTION)}, or train.packed=true."
        )
    package = PACKAGES.get(attention)
    if package and find_spec(package) is None:
        raise UserError(
            f"model.attention={attention} needs the package {package}, which is not installed; install it into "
            "the environment, or take model.attention=sdpa."
        )


def check_parquet(
    path: Path, columns: Iterable[str], image_columns: Sequence[str] = schema.IMAGES, sample: int = 16
) -> None:
    """Refuse a split that is unreadable, empty, lacks a column, or holds something that is not an image.

    `path` names a parquet file, or shards of it (`data/schema.py`). Images are decoded in `sample` rows spread evenly
    over the split, none above `pictures.MAX_PIXELS`. That every row is valid is recorded by the stamp of
    `data.validate`.
    """
    columns = list(dict.fromkeys(("id", *columns, *image_columns)))
    count = schema.count_rows(path, columns)
    if count == 0:
        raise UserError(f"{path}: holds no row; prepare it again.")
    sample = min(sample, count)
    chosen = {i * count // sample for i in range(sample)} | {count - 1}
    for row in schema.rows_at(path, chosen, ["id", *image_columns]):
        for column in image_columns:
            try:
                schema.decode_image(row[column] or {}, path.parent)
            except UserError as error:
                raise UserError(f"{path}: row {row['id']}, column {column}: {error}") from error


def check_enough_rows(path: Path, prompts: int) -> None:
    """Refuse a training split (a parquet file, or shards of it) that has no whole batch of `prompts` rows."""
    rows = schema.count_rows(path)
    if rows < prompts:
        raise UserError(f"{path}: has {rows} rows, fewer than train.prompts={prompts}; take fewer prompts.")
