"""A model's output head that turns hidden states into per-token numbers without ever holding all logits.

Losses over a vocabulary of 248k tokens would need (response tokens x vocabulary) floats several times over.
Here the head itself runs the method's `score` on a few rows at a time, inside the model's own forward
(where FSDP2 has the head's weight gathered), and returns the per-token numbers in the place of logits
(`vopd.backbone.chunked_score`). Without an active context the head is the plain linear layer it replaces.

Shape suffixes: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from vopd.backbone.chunked_score import chunked_score
from vopd.backbone.scoring import ScoringContext


@dataclass
class GatherContext:
    """Makes the head return its input (1, N, H): a scorer's hidden states at its response positions."""

    positions_N: Tensor | None = None


class ScoringHead(nn.Module):
    """Bias-free output projection, weight (V, H), that obeys an active context (see `active`).

    It keeps the very Parameter it is given: a weight tied to the embedding stays tied, names do not change.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        # An attribute, not a context variable: autograd may recompute a checkpoint in another thread.
        self.context: ScoringContext | GatherContext | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden (..., H); with an active context what that context promises."""
        context = self.context
        if context is None:
            return nn.functional.linear(hidden, self.weight)
        hidden_NH = _at_positions(hidden, context.positions_N)
        if isinstance(context, GatherContext):
            return hidden_NH.unsqueeze(0)
        if len(hidden_NH) != len(context.tokens_N):
            raise ValueError(
                f"the head got {len(hidden_NH)} hidden states for {len(context.tokens_N)} tokens: pass the "
                "response positions as logits_to_keep or as the context's positions_N."
            )
        return chunked_score(hidden_NH, self.weight, context).unsqueeze(0)


def install_head(model: nn.Module) -> ScoringHead:
    """Replace `model.lm_head`, a bias-free Linear, by a ScoringHead on the same weight; returns the head.

    Call it before the model is sharded. Raises ValueError if there is no such lm_head.
    """
    linear = getattr(model, "lm_head", None)
    if not isinstance(linear, nn.Linear) or linear.bias is not None:
        raise ValueError(f"{type(model).__name__} has no bias-free linear lm_head to replace: {linear!r}.")
    head = ScoringHead(linear.weight)
    model.lm_head = head
    return head


@contextmanager
def active(head: ScoringHead, context: ScoringContext | GatherContext) -> Iterator[None]:
    """Within the block the head obeys `context`; a backward may come after it.

    Gradient checkpoints of the layers below need nothing. One around the head itself must have this block
    inside it, or be run backward within the block.
    """
    previous, head.context = head.context, context
    try:
        yield
    finally:
        head.context = previous


def _at_positions(hidden: Tensor, positions_N: Tensor | None) -> Tensor:
    if positions_N is not None:
        # Not by `[]`: rollouts share a prompt's last position, and on a CPU the backward of `[]` adds there in whatever
        # order its threads arrive.
        return hidden.flatten(0, -2).index_select(0, positions_N)
    if hidden.dim() != 3 or hidden.shape[0] != 1:
        raise ValueError(
            f"hidden states of shape {tuple(hidden.shape)}: without positions_N the batch size must be 1."
        )
    return hidden[0]
