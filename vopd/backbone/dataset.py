"""Triplets as verl's data set: splits (a parquet file or its shards), rows as they are, images still encoded.

Pixels are decoded where a prompt is rendered, so a batch of large images stays small on its way through Ray. An image
that a row names by path is read when the row is taken: another machine's rollout worker need not see the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import datasets
import torch
from torch.utils.data import Dataset

from data import schema
from vopd.errors import UserError

UNUSED = ("original",)  # neither view shows it


class TripletDataset(Dataset):
    """Random access to triplet rows; the signature is verl's (`data.custom_cls`)."""

    def __init__(
        self, data_files: Any, tokenizer: Any, config: Any, processor: Any = None, max_samples: int = -1
    ) -> None:
        paths = [Path(f) for f in ([data_files] if isinstance(data_files, str) else data_files)]
        self.folders: list[Path] = []
        parts = []
        for path in paths:
            part = schema.encoded(schema.shards(path))
            parts.append(part.remove_columns([c for c in UNUSED if c in part.column_names]))
            self.folders += [path.parent] * len(part)
        rows = datasets.concatenate_datasets(parts)
        self.rows = rows.select(range(min(max_samples, len(rows)))) if max_samples > 0 else rows

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> schema.Triplet:
        """One row, its images as encoded bytes.

        Raises:
            UserError: an image that a cell names is not there; names row and column.
        """
        row: dict[str, Any] = dict(self.rows[index])
        for column in schema.IMAGES:
            try:
                row[column] = {"bytes": schema.image_bytes(row[column], self.folders[index]), "path": None}
            except UserError as error:
                raise UserError(f"Row {row['id']}, column {column}: {error}") from error
        return cast(schema.Triplet, row)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "row": self.row(index),
            "index": index,
            # verl's collate wants at least one tensor per row.
            "dummy_tensor": torch.zeros(1, dtype=torch.uint8),
        }
