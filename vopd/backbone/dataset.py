"""Triplets as verl's data set: one parquet file (or several), rows as they are, images still encoded.

Pixels are decoded where a prompt is rendered, so a batch of large images stays small on its way through Ray.
"""

from __future__ import annotations

from typing import Any

import datasets
import torch
from torch.utils.data import Dataset


class TripletDataset(Dataset):
    """Random access to triplet rows; the signature is verl's (`data.custom_cls`)."""

    def __init__(
        self, data_files: Any, tokenizer: Any, config: Any, processor: Any = None, max_samples: int = -1
    ) -> None:
        files = [str(f) for f in ([data_files] if isinstance(data_files, str) else data_files)]
        rows = datasets.Dataset.from_parquet(files, keep_in_memory=False)
        for column in ("image", "crop"):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        self.rows = rows.select(range(min(max_samples, len(rows)))) if max_samples > 0 else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "row": self.rows[index],
            "index": index,
            # verl's collate wants at least one tensor per row.
            "dummy_tensor": torch.zeros(1, dtype=torch.uint8),
        }
