"""What travels between trainer, rollout workers and TransferQueue, by its keys.

A `Prompt` goes to a rollout worker. For each of its responses the worker puts `Fields` (in training `TrainingFields`)
and a `Tag` into the queue, under the key `PROMPT_ROLLOUT_TURN`; in training also the prompt's views, once.

Legend: P prompt tokens, R response tokens, L = P + R.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import torch

if TYPE_CHECKING:  # it takes a second, and a worker's process needs its name alone
    from data.schema import Triplet


class Recorded(TypedDict):
    """Responses of a recording to one prompt, by rollout index."""

    tokens: list[list[int]]
    log_probs: list[list[float]]


class Prompt(TypedDict):
    """One prompt of a batch, as a rollout worker gets it.

    views: names of the views to render, joined by commas; the first one generates. uid: its number in the prompt
    stream. recorded: responses to take instead of generating.
    """

    row: Triplet
    views: str
    uid: str
    global_steps: int
    recorded: NotRequired[Recorded]


class Trajectory(TypedDict):
    """What verl says of a prompt: the update it is for, and whether it is part of an evaluation."""

    step: int
    validate: bool


class Answer(TypedDict):
    """One response to one question, read: what `vopd.evaluation.records.Record` is made of."""

    id: str
    family: str
    view: str
    split: str
    prompt: str
    response: str
    response_tokens: int
    truncated: bool
    parsed: str | None
    gold: str
    correct: bool


class RenderedView(TypedDict):
    """A rendered prompt as the trainer needs it (`vopd.backbone.rendering.Rendered`).

    prompt_ids: (P,). position_ids: (4, P). multi_modal_inputs: packed (`vopd.backbone.pixels`).
    """

    key: str
    prompt_ids: torch.Tensor
    position_ids: torch.Tensor
    multi_modal_inputs: dict[str, torch.Tensor]


class Fields(TypedDict):
    """What is stored of every response."""

    record: Answer


class TrainingFields(Fields):
    """What is stored of a response to train on.

    uid: the prompt's number, under which its views are stored. prompts: (P,). responses, response_mask, loss_mask,
    rollout_log_probs: (R,). input_ids: (L,). extra_fields: where verl's filter of groups looks for its metric.
    """

    uid: str
    prompts: torch.Tensor
    responses: torch.Tensor
    input_ids: torch.Tensor
    response_mask: torch.Tensor
    loss_mask: torch.Tensor
    rollout_log_probs: torch.Tensor
    extra_fields: dict[str, Any]


class Tag(TypedDict):
    """What the queue says of a response without its tensors; lengths in tokens.

    min_global_steps, max_global_steps: updates of the weights that sampled it; None for a recorded response.
    stored_bytes: of what the queue holds of it, with its share of the prompt's views.
    """

    status: str
    prompt_len: int
    response_len: int
    seq_len: int
    global_steps: int
    min_global_steps: int | None
    max_global_steps: int | None
    stored_bytes: float
