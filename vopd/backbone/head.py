"""A model's output head that turns hidden states into per-token numbers without ever holding all logits.

Losses over a vocabulary of 248k tokens would need (response tokens x vocabulary) floats several times over.
Here the head itself runs the method's `score` on a few rows at a time, inside the model's own forward
(where FSDP2 has the head's weight gathered), and returns the per-token numbers in the place of logits. The
backward projects each chunk again. Without an active context the head is the plain linear layer it replaces.

Shape suffixes: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vopd.method import ScoreChunk


@dataclass(frozen=True)
class Component:
    """One weight set's view of the response: its hidden states, its head, its share in the scorer's log-probs."""

    hidden_NH: Tensor
    weight_VH: Tensor
    coefficient: float = 1.0


Scorer = tuple[Component, ...]
"""One component: its logits. Several: the sum of coefficient * log_softmax, a geometric mixture."""


Score = Callable[[ScoreChunk], Mapping[str, Tensor]]
"""Per-token numbers by name, each (C,). Called in forward and again in backward: must be deterministic."""


@dataclass
class ScoringContext:
    """What the head needs to return per-token numbers (1, N, M), float32, in the place of logits.

    Args:
        score: the method's function.
        names: the names it returns, in the order of the M columns.
        tokens_N: the token that follows each scored position.
        chunk: rows projected at a time.
        scorers: by name, what is projected beside the student, without gradient.
        extras: per-token tensors (N, ...) that `score` wants, cut along with the chunk.
        positions_N: where the scored hidden states are in the flattened (batch * length) row; None if the
            model was called with them as `logits_to_keep` (batch size 1) and the head gets no others.

    Raises:
        ValueError: chunk < 1, a scorer without component, or a length other than that of tokens_N.
    """

    score: Score
    names: tuple[str, ...]
    tokens_N: Tensor
    chunk: int
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    positions_N: Tensor | None = None

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} rows at a time cannot be projected: set it to 1 or more.")
        lengths = {f"extras[{name!r}]": len(tensor) for name, tensor in self.extras.items()}
        for name, scorer in self.scorers.items():
            if not scorer:
                raise ValueError(
                    f"scorer {name!r} has no component: give it hidden states and a head weight."
                )
            lengths |= {f"scorers[{name!r}][{i}]": len(part.hidden_NH) for i, part in enumerate(scorer)}
        for name, length in lengths.items():
            if length != len(self.tokens_N):
                raise ValueError(f"{name} has {length} rows but there are {len(self.tokens_N)} tokens.")


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
        return _ChunkedScore.apply(hidden_NH, self.weight, context).unsqueeze(0)


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


class _ChunkedScore(torch.autograd.Function):
    """(N, H), (V, H) -> (N, M). The weight is an input, so its gradient goes FSDP2's and tying's usual way."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, context: ScoringContext) -> Tensor:
        ctx.save_for_backward(hidden_NH, weight_VH)
        ctx.context = context
        with _full_precision(hidden_NH):
            student = _Projection(hidden_NH, weight_VH)
            scorers = _projections(context)
            per_token_NM = torch.empty(
                len(hidden_NH), len(context.names), dtype=student.dtype, device=hidden_NH.device
            )
            for rows in _chunks(context):
                chunk = _score_chunk(student.logits(rows), scorers, context, rows)
                for column, number_C in enumerate(_numbers(chunk, context)):
                    per_token_NM[rows, column] = number_C
        return per_token_NM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_NH, weight_VH = ctx.saved_tensors
        context: ScoringContext = ctx.context
        with _full_precision(hidden_NH):
            student = _Projection(hidden_NH, weight_VH)
            scorers = _projections(context)
            grad_hidden_NH = torch.zeros_like(hidden_NH, dtype=student.dtype)
            grad_weight_VH = torch.zeros_like(weight_VH, dtype=student.dtype)
            for rows in _chunks(context):
                logits_CV = student.logits(rows).requires_grad_()
                with torch.enable_grad():
                    numbers = _numbers(_score_chunk(logits_CV, scorers, context, rows), context)
                columns = [i for i, number_C in enumerate(numbers) if number_C.requires_grad]
                if columns:
                    (grad_logits_CV,) = torch.autograd.grad(
                        [numbers[i] for i in columns], logits_CV, [grad_NM[rows, i] for i in columns]
                    )
                    student.accumulate(grad_logits_CV, rows, grad_hidden_NH, grad_weight_VH)
        return grad_hidden_NH.to(hidden_NH.dtype), grad_weight_VH.to(weight_VH.dtype), None


class _Projection:
    """hidden @ weight.T row by row with float32 accumulation and result, and its gradient.

    Half-precision operands stay as they are on CUDA, whose matmul can return float32 (a float32 copy of the
    weight would be gigabytes); elsewhere they are converted. float64 stays float64.
    """

    def __init__(self, hidden_NH: Tensor, weight_VH: Tensor) -> None:
        self.dtype = torch.promote_types(torch.promote_types(hidden_NH.dtype, weight_VH.dtype), torch.float32)
        same_dtype = hidden_NH.dtype == weight_VH.dtype
        self.mixed = hidden_NH.is_cuda and same_dtype and weight_VH.dtype in (torch.bfloat16, torch.float16)
        self.hidden_NH = hidden_NH
        self.weight_VH = weight_VH if self.mixed else weight_VH.to(self.dtype)

    def logits(self, rows: slice) -> Tensor:
        return self._matmul(self.hidden_NH[rows], self.weight_VH.t())

    def accumulate(
        self, grad_CV: Tensor, rows: slice, grad_hidden_NH: Tensor, grad_weight_VH: Tensor
    ) -> None:
        """Write the chunk's hidden gradient; add its weight gradient, in float32."""
        grad_hidden_NH[rows] = self._matmul(grad_CV, self.weight_VH)
        grad_weight_VH.addmm_(grad_CV.t(), self.hidden_NH[rows].to(self.dtype))

    def _matmul(self, left: Tensor, right: Tensor) -> Tensor:
        if self.mixed:
            return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
        return left.to(self.dtype) @ right


def _full_precision(like: Tensor) -> torch.autocast:
    """verl runs the forward under autocast, which would round the logits to half precision."""
    return torch.autocast(like.device.type, enabled=False)


def _chunks(context: ScoringContext) -> Iterator[slice]:
    positions = len(context.tokens_N)
    for start in range(0, positions, context.chunk):
        yield slice(start, min(start + context.chunk, positions))


def _projections(context: ScoringContext) -> dict[str, list[tuple[_Projection, float]]]:
    return {
        name: [(_Projection(part.hidden_NH, part.weight_VH), part.coefficient) for part in scorer]
        for name, scorer in context.scorers.items()
    }


def _score_chunk(
    student_logits_CV: Tensor,
    scorers: Mapping[str, list[tuple[_Projection, float]]],
    context: ScoringContext,
    rows: slice,
) -> ScoreChunk:
    with torch.no_grad():
        scorer_logits = {name: _scorer_logits(parts, rows) for name, parts in scorers.items()}
    extras = {name: tensor[rows] for name, tensor in context.extras.items()}
    return ScoreChunk(student_logits_CV, scorer_logits, context.tokens_N[rows], extras)


def _scorer_logits(parts: list[tuple[_Projection, float]], rows: slice) -> Tensor:
    if len(parts) == 1:
        projection, coefficient = parts[0]
        return projection.logits(rows).mul_(coefficient)
    mixture_CV = torch.zeros((), dtype=parts[0][0].dtype, device=parts[0][0].weight_VH.device)
    for projection, coefficient in parts:
        mixture_CV = mixture_CV + projection.logits(rows).log_softmax(-1).mul_(coefficient)
    return mixture_CV


def _numbers(chunk: ScoreChunk, context: ScoringContext) -> list[Tensor]:
    """The score's outputs in the order of context.names, checked."""
    scored = context.score(chunk)
    missing, unknown = sorted(set(context.names) - set(scored)), sorted(set(scored) - set(context.names))
    if missing or unknown:
        raise ValueError(f"score returned other names than declared: missing {missing}, unknown {unknown}.")
    for name in context.names:
        if scored[name].shape != chunk.tokens_C.shape:
            raise ValueError(
                f"score returned {name!r} of shape {tuple(scored[name].shape)}; it must be one number per "
                f"token, {tuple(chunk.tokens_C.shape)}."
            )
    return [scored[name] for name in context.names]
