"""The rows of a forward: prompts and responses laid out as the model reads them.

Packed, every response follows a prompt of its own and rows are concatenated. Padded, a prompt occurs once, with all the
responses that the batch holds for it (`shared_prompts`).

Shape suffixes: B responses, G rows, L tokens of a row, N response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vopd.backbone.rendering import with_response
from vopd.backbone.rows import RenderedView
from vopd.backbone.shared_prompts import Layout


@dataclass(frozen=True)
class Rows:
    """What the model is given.

    Attributes:
        prompts: of each row.
        ids, positions: of each row, (L,) and (4, L).
        predicted_at_N: places in the flattened batch whose hidden states predict the response tokens, in the order
            of the responses.
        layout: of rows with shared prompts; None for packed rows.
    """

    prompts: list[RenderedView]
    ids: list[Tensor]
    positions: list[Tensor]
    predicted_at_N: Tensor
    layout: Layout | None = None


def packed(prompts: list[RenderedView], responses: list[Tensor]) -> Rows:
    """One row a response."""
    pairs = [with_response(p, r) for p, r in zip(prompts, responses, strict=True)]
    predicted_at_N = response_positions([len(ids) for ids, _ in pairs], [len(r) for r in responses])
    return Rows(prompts, [ids for ids, _ in pairs], [p for _, p in pairs], predicted_at_N)


def shared(prompts: list[RenderedView], responses: list[Tensor]) -> Rows:
    """One row a prompt, padded; all rows equally wide."""
    first_G, row_B = unique_rows([(p["key"], tuple(p["prompt_ids"].tolist())) for p in prompts])
    lengths_G = [len(prompts[i]["prompt_ids"]) for i in first_G]
    place_B = [row_B[:i].count(row) for i, row in enumerate(row_B)]
    longest = max(1, *(len(r) for r in responses))
    layout = Layout(torch.tensor(lengths_G), max(lengths_G), max(place_B) + 1, longest)
    ids = [
        pad(prompts[i]["prompt_ids"], (0, layout.width - n)) for i, n in zip(first_G, lengths_G, strict=True)
    ]
    positions = [
        pad(prompts[i]["position_ids"], (0, layout.width - n))
        for i, n in zip(first_G, lengths_G, strict=True)
    ]
    predicted_at = []
    for prompt, response_R, row, place in zip(prompts, responses, row_B, place_B, strict=True):
        whole_L, positions_4L = with_response(prompt, response_R)
        start, length, behind = layout.P + place * layout.R, len(response_R), len(prompt["prompt_ids"])
        ids[row][start : start + length] = whole_L[behind:]
        positions[row][:, start : start + length] = positions_4L[:, behind:]
        predicted_at.append(layout.positions(row, place, length))
    return Rows([prompts[i] for i in first_G], ids, positions, torch.cat(predicted_at), layout)


def response_positions(lengths_B: list[int], responses_B: list[int]) -> Tensor:
    """Positions in the packed sequence of the hidden states that predict response tokens.

    Response token at position t is predicted at t - 1, the end-of-sequence token included; offsets are those of
    the view at hand, whose prompt has a length of its own.
    """
    ends = torch.tensor(lengths_B).cumsum(0).tolist()
    return torch.cat(
        [torch.arange(end - response - 1, end - 1) for end, response in zip(ends, responses_B, strict=True)]
    )


def unique_rows(keys: Sequence[Any]) -> tuple[list[int], list[int]]:
    """First row of every distinct key, and for each row the number of its key: ([0, 2], [0, 0, 1]) for a, a, b."""
    numbers: dict[Any, int] = {}
    unique_B = [numbers.setdefault(key, len(numbers)) for key in keys]
    return [unique_B.index(number) for number in range(len(numbers))], unique_B


def together(prompts_B: Sequence[Any], lengths_B: Sequence[int], limit: int) -> int:
    """How many rows, one behind the other, a micro-batch of `limit` tokens can always take of one prompt.

    The largest divisor of the rollouts a prompt for which no such run of rows is over the limit; 1 where prompts have
    different numbers of rollouts. A row over the limit counts as one.
    """
    runs = [len(list(run)) for _, run in groupby(prompts_B)]
    size = runs[0] if len(set(runs)) == 1 else 1
    divisors = [d for d in range(size, 0, -1) if size % d == 0]
    fits = (
        d
        for d in divisors
        if d == 1 or max(sum(lengths_B[i : i + d]) for i in range(0, len(lengths_B), d)) <= limit
    )
    return next(fits)
