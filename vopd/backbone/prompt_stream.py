"""The prompts of a run: drawn from the data loader in its order, or named by a recording, as verl's prompt batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vopd.backbone import recorded_rollouts, verl_internals
from vopd.backbone.dataset import TripletDataset
from vopd.errors import UserError


class PromptStream:
    """Prompts are numbered as they are asked, so that sorting their keys is sorting the stream.

    Attributes:
        drawn: prompts that were asked so far, evaluations included.
    """

    def __init__(self) -> None:
        self.drawn = 0
        self._iterator: Iterator[Any] | None = None
        self._places: dict[str, int] = {}

    def draw(self, loader: Any, count: int) -> list[dict[str, Any]]:
        """The next rows of the loader, over the end of an epoch; `count` is a multiple of its batch.

        Raises:
            UserError: the training file has fewer rows than a batch.
        """
        rows: list[dict[str, Any]] = []
        while len(rows) < count:
            if self._iterator is None:
                self._iterator = iter(loader)
            drawn = next(self._iterator, None)
            if drawn is None:
                self._iterator = iter(loader)
                drawn = next(self._iterator, None)
            if drawn is None:
                raise UserError(
                    f"train.prompts={count}: the training file has fewer rows; take fewer prompts."
                )
            rows.extend(drawn["row"])
        return rows

    def row(self, dataset: TripletDataset, row_id: str, recording: Path) -> dict[str, Any]:
        """The row that a recording names; UserError if the data does not have it."""
        self._places = self._places or {name: place for place, name in enumerate(dataset.rows["id"])}
        if row_id not in self._places:
            raise UserError(f"{recording}: row {row_id} is not in the training data; take the same data.")
        return dataset.row(self._places[row_id])

    def requests(
        self,
        rows: list[dict[str, Any]],
        views: list[str],
        groups: list[recorded_rollouts.Group] | None = None,
    ) -> Any:
        """Rows as verl's prompt batch.

        Args:
            rows: of the data.
            views: per row, the views to render, joined by commas; the first one generates.
            groups: responses to take instead of generating.
        """
        recorded = {"recorded": [{"tokens": g.tokens, "log_probs": g.log_probs} for g in groups or []]}
        uids = [f"{self.drawn + i:010d}" for i in range(len(rows))]
        self.drawn += len(rows)
        return verl_internals.get_tensordict(
            {
                "row": rows,
                "views": views,
                "uid": uids,
                "index": list(range(len(rows))),
                "dummy_tensor": torch.zeros(len(rows), 1, dtype=torch.uint8),
                **(recorded if groups else {}),
            }
        )
