"""What the head is handed to score a response with: the method's function, tokens, and the scorers' hidden states.

Shape suffixes: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

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
"""Per-token numbers by name, each (C,). Called in forward and, if it keeps much, in backward: deterministic."""


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
