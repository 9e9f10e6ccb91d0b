"""A method's `score` over many positions, a chunk of logits at a time, with gradient.

The backward needs a chunk's logits again. What autograd keeps of `score` in the forward is looked at: logits are left
out and projected again when the backward asks for them (as a rule the student's alone, and the last chunk's are still
there); small tensors are kept. Where they add up to more than one chunk of logits, `score` runs again in the backward.
So memory is a few times chunk x vocabulary, whatever the number of positions, and `score` stays plain torch.

Shape suffixes: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from vopd.backbone.projection import STUDENT, Gradients, Logits, Projection
from vopd.backbone.scoring import ScoringContext
from vopd.method import ScoreChunk


def chunked_score(hidden_NH: Tensor, weight_VH: Tensor, context: ScoringContext) -> Tensor:
    """The numbers (N, M) that the context's score gives for these hidden states; one backward may follow.

    Raises:
        ValueError: score returned other names than the context's, or other than one number per token.
    """
    numbers_NM: Tensor = _ChunkedScore.apply(hidden_NH, weight_VH, context, torch.is_grad_enabled())
    return numbers_NM


class _ChunkedScore(torch.autograd.Function):
    """(N, H), (V, H) -> (N, M). The weight is an input, so its gradient goes FSDP2's and tying's usual way."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, context: ScoringContext, differentiable: bool
    ) -> Tensor:
        ctx.save_for_backward(hidden_NH, weight_VH)
        ctx.context = context
        with _full_precision(hidden_NH):
            logits = Logits(Projection(hidden_NH, weight_VH), context)
            kept = _Kept(room=logits.bytes_of_chunk() if differentiable else 0)
            ctx.chunks = [_Chunk(rows) for rows in _chunks(context)]
            per_token_NM = hidden_NH.new_empty(len(hidden_NH), len(context.names), dtype=logits.dtype)
            for chunk in ctx.chunks:
                for column, number_C in enumerate(chunk.score(logits, context, kept)):
                    per_token_NM[chunk.rows, column] = number_C
            handed = logits.hand_over()
            ctx.last_logits = handed if differentiable else (None, None)
        return per_token_NM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden_NH, weight_VH = ctx.saved_tensors
        if ctx.chunks is None:
            raise RuntimeError("the head's graph was let go by the first backward; run the forward again.")
        chunks, ctx.chunks = ctx.chunks, None
        with _full_precision(hidden_NH):
            student = Projection(hidden_NH, weight_VH)
            gradients = Gradients(student, frozen_weight=not ctx.needs_input_grad[1])
            logits = Logits(student, ctx.context)
            logits.take_over(*ctx.last_logits)
            ctx.last_logits = None
            while chunks:  # from the last one, whose logits are there; each is let go as it is done
                chunk = chunks.pop()
                grad_CV = chunk.logits_gradient(grad_NM[chunk.rows], logits, ctx.context)
                if grad_CV is not None:
                    gradients.add(grad_CV, chunk.rows)
        return *gradients.result(hidden_NH, weight_VH), None, None


@dataclass
class _Kept:
    """How many more bytes the graphs of all chunks together may keep."""

    room: int


class _Chunk:
    """One chunk's pass through `score`, and its graph if that is kept."""

    def __init__(self, rows: slice) -> None:
        self.rows = rows
        self._numbers: list[Tensor] = []
        self._entry: _Entry | None = None

    def score(self, logits: Logits, context: ScoringContext, kept: _Kept) -> list[Tensor]:
        """The chunk's numbers (C,) in the order of context.names, without gradient."""
        if kept.room <= 0:
            return _numbers(logits.chunk(logits.of(STUDENT, self.rows), self.rows), context)
        self._entry = _Entry(self.rows)
        self._follow(logits, context, saved_tensors_hooks(partial(_pack, self._entry, logits, kept), _unpack))
        numbers = [number_C.detach() for number_C in self._numbers]
        if kept.room <= 0:
            self._numbers, self._entry = [], None
        return numbers

    def logits_gradient(self, grad_CM: Tensor, logits: Logits, context: ScoringContext) -> Tensor | None:
        """The gradient (C, V) of the student's logits from those of the numbers; None if there is none."""
        if self._entry is None:
            self._entry = _Entry(self.rows)
            self._follow(logits, context, nullcontext())
        columns = [i for i, number_C in enumerate(self._numbers) if number_C.requires_grad]
        if columns:
            self._entry.logits = logits
            roots, grads = [self._numbers[i] for i in columns], [grad_CM[:, i] for i in columns]
            torch.autograd.grad(roots, self._entry.anchor, grads, allow_unused=True)
        return self._entry.grad_CV

    def _follow(self, logits: Logits, context: ScoringContext, hooks: Any) -> None:
        assert self._entry is not None
        student_CV = logits.of(STUDENT, self.rows)
        with torch.enable_grad():
            entered_CV = _Enter.apply(self._entry.anchor, student_CV, self._entry)
            with hooks:
                self._numbers = _numbers(logits.chunk(entered_CV, self.rows), context)


@dataclass
class _Entry:
    """Where a chunk's graph begins. The graph holds this; that this does not hold the graph lets both be freed."""

    rows: slice
    logits: Logits | None = None  # makes the logits again, during the backward
    grad_CV: Tensor | None = None
    anchor: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))


class _Enter(torch.autograd.Function):
    """The student's logits with a gradient, which is left in the entry. (A leaf would be held by the graph.)"""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, logits_CV: Tensor, entry: _Entry) -> Tensor:
        ctx.entry = entry
        return logits_CV.view_as(logits_CV)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_CV: Tensor) -> tuple[None, None, None]:
        ctx.entry.grad_CV = grad_CV
        return None, None, None


@dataclass(frozen=True)
class _Again:
    """A view of logits that the backward makes again."""

    entry: _Entry
    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _pack(entry: _Entry, logits: Logits, kept: _Kept, tensor: Tensor) -> Tensor | _Again:
    """What autograd keeps in the tensor's place."""
    name = logits.name_of(tensor)
    if name is not None:
        return _Again(entry, name, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
    kept.room -= tensor.untyped_storage().nbytes()
    return tensor.detach()


def _unpack(kept: Tensor | _Again) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    logits = kept.entry.logits
    assert logits is not None
    return logits.of(kept.name, kept.entry.rows).as_strided(kept.size, kept.stride, kept.offset)


def _full_precision(like: Tensor) -> torch.autocast:
    """verl runs the forward under autocast, which would round the logits to half precision."""
    return torch.autocast(like.device.type, enabled=False)


def _chunks(context: ScoringContext) -> Iterator[slice]:
    positions = len(context.tokens_N)
    for start in range(0, positions, context.chunk):
        yield slice(start, min(start + context.chunk, positions))


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
