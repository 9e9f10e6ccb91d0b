"""Hidden states times a head's weight, a chunk of rows at a time, and the gradients of that product.

Logits live in one buffer per policy, which each chunk overwrites: fresh memory of that size costs as much as a third of
the product that fills it.

Shape suffixes: docs/glossary.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vopd.backbone.scoring import Scorer, ScoringContext
from vopd.method import ScoreChunk

STUDENT = ""  # the student's place among the scorers' names


class Projection:
    """hidden @ weight.T row by row with float32 accumulation and result, and its gradients.

    Half-precision operands stay as they are on CUDA, whose matmul can return float32 (a float32 copy of the
    weight would be gigabytes); elsewhere they are converted. float64 stays float64.
    """

    def __init__(self, hidden_NH: Tensor, weight_VH: Tensor) -> None:
        self.dtype = torch.promote_types(torch.promote_types(hidden_NH.dtype, weight_VH.dtype), torch.float32)
        same_dtype = hidden_NH.dtype == weight_VH.dtype
        self.mixed = hidden_NH.is_cuda and same_dtype and weight_VH.dtype in (torch.bfloat16, torch.float16)
        self.hidden_NH = hidden_NH
        self.weight_VH = weight_VH if self.mixed else weight_VH.to(self.dtype)

    def write_logits(self, rows: slice, logits_CV: Tensor) -> None:
        """Project these rows into logits_CV."""
        self._matmul(self._operand(self.hidden_NH[rows]), self.weight_VH.t(), logits_CV)

    def write_hidden_gradient(self, grad_CV: Tensor, grad_CH: Tensor) -> None:
        """The gradient of a chunk's hidden states from that of its logits."""
        self._matmul(self._operand(grad_CV), self.weight_VH, grad_CH)

    def add_weight_gradient(self, grad_CV: Tensor, rows: slice, grad_VH: Tensor) -> None:
        """Add a chunk's share of the weight's gradient, in float32."""
        grad_VC, hidden_CH = self._operand(grad_CV).t(), self._operand(self.hidden_NH[rows])
        if self.mixed:
            torch.addmm(grad_VH, grad_VC, hidden_CH, out_dtype=self.dtype, out=grad_VH)
        else:
            grad_VH.addmm_(grad_VC, hidden_CH)

    def _operand(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.weight_VH.dtype)

    def _matmul(self, left: Tensor, right: Tensor, result: Tensor) -> None:
        if self.mixed:
            torch.mm(left, right, out_dtype=self.dtype, out=result)
        else:
            torch.mm(left, right, out=result)


class Logits:
    """The logits of one chunk at a time, of the student and of every scorer, made when they are asked for."""

    def __init__(self, student: Projection, context: ScoringContext) -> None:
        self.dtype = student.dtype
        self._student, self._context = student, context
        self._scorers = {name: _projections(scorer) for name, scorer in context.scorers.items()}
        self._buffers: dict[str, Tensor] = {}
        self._held: dict[str, slice] = {}  # the rows whose logits a buffer holds

    def of(self, name: str, rows: slice) -> Tensor:
        """Logits (C, V) of these rows, overwritten by those of the next ones that are asked for."""
        buffer_CV = self._buffer(name)[: rows.stop - rows.start]
        if self._held.get(name) != rows:
            self._held[name] = rows
            if name == STUDENT:
                self._student.write_logits(rows, buffer_CV)
            else:
                _write_mixture(self._scorers[name], rows, buffer_CV)
        return buffer_CV

    def chunk(self, student_logits_CV: Tensor, rows: slice) -> ScoreChunk:
        """What `score` sees of these rows."""
        context = self._context
        with torch.no_grad():
            scorer_logits = {name: self.of(name, rows) for name in self._scorers}
        extras = {name: tensor[rows] for name, tensor in context.extras.items()}
        return ScoreChunk(student_logits_CV, scorer_logits, context.tokens_N[rows], extras)

    def name_of(self, tensor: Tensor) -> str | None:
        """Whose logits the tensor is a view of; None if of none."""
        address = tensor.untyped_storage().data_ptr()
        for name, buffer_CV in self._buffers.items():
            if buffer_CV.untyped_storage().data_ptr() == address:
                return name
        return None

    def bytes_of_chunk(self) -> int:
        """Size of one chunk's logits."""
        return self._rows() * len(self._student.weight_VH) * self.dtype.itemsize

    def hand_over(self) -> tuple[slice | None, Tensor | None]:
        """The student's last rows and its buffer, for `take_over`; all buffers are let go here.

        Autograd's hooks hold on to this object until the backward.
        """
        handed = self._held.get(STUDENT), self._buffers.get(STUDENT)
        self._held, self._buffers = {}, {}
        return handed

    def take_over(self, rows: slice | None, buffer_CV: Tensor | None) -> None:
        """Begin with logits that are there already."""
        if rows is not None and buffer_CV is not None:
            self._held[STUDENT], self._buffers[STUDENT] = rows, buffer_CV

    def _rows(self) -> int:
        return min(self._context.chunk, len(self._student.hidden_NH))

    def _buffer(self, name: str) -> Tensor:
        if name not in self._buffers:
            weight_VH = self._student.weight_VH if name == STUDENT else self._scorers[name][0][0].weight_VH
            dtype = self.dtype if name == STUDENT else self._scorers[name][0][0].dtype
            self._buffers[name] = weight_VH.new_empty(self._rows(), len(weight_VH), dtype=dtype)
        return self._buffers[name]


class Gradients:
    """Gradients of hidden states and weight, added up chunk by chunk in float32; a frozen weight costs nothing."""

    def __init__(self, student: Projection, frozen_weight: bool) -> None:
        self._student, self._frozen_weight = student, frozen_weight
        self._hidden_NH = torch.zeros_like(student.hidden_NH, dtype=student.dtype)
        self._weight_VH = None if frozen_weight else torch.zeros_like(student.weight_VH, dtype=student.dtype)

    def add(self, grad_CV: Tensor, rows: slice) -> None:
        """The share of a chunk, from the gradient of its logits."""
        self._student.write_hidden_gradient(grad_CV, self._hidden_NH[rows])
        if self._weight_VH is not None:
            self._student.add_weight_gradient(grad_CV, rows, self._weight_VH)

    def result(self, like_hidden_NH: Tensor, like_weight_VH: Tensor) -> tuple[Tensor, Tensor | None]:
        """Both, in the dtypes of what they are the gradients of; None for a frozen weight."""
        weight_VH = None if self._weight_VH is None else self._weight_VH.to(like_weight_VH.dtype)
        return self._hidden_NH.to(like_hidden_NH.dtype), weight_VH


def _projections(scorer: Scorer) -> list[tuple[Projection, float]]:
    return [(Projection(part.hidden_NH, part.weight_VH), part.coefficient) for part in scorer]


def _write_mixture(parts: list[tuple[Projection, float]], rows: slice, logits_CV: Tensor) -> None:
    """One component's logits, or the sum of coefficient * log_softmax of several."""
    first, coefficient = parts[0]
    first.write_logits(rows, logits_CV)
    if len(parts) == 1:
        if coefficient != 1.0:
            logits_CV.mul_(coefficient)
        return
    logits_CV.sub_(logits_CV.logsumexp(-1, keepdim=True)).mul_(coefficient)
    for projection, coefficient in parts[1:]:
        part_CV = torch.empty_like(logits_CV)
        projection.write_logits(rows, part_CV)
        logits_CV.add_(part_CV.sub_(part_CV.logsumexp(-1, keepdim=True)), alpha=coefficient)
