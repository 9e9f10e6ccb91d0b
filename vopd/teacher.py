"""Teacher weights: fp32 copies of the student's own shards, moved after each applied optimiser step.

A teacher lives on the worker as the local shard of every parameter, so a moving average needs no communication.
To score, a teacher's shards change places with the student's in the one sharded module: no second model is built,
student and teacher run the same code, and nothing (embedding, head, norm) can be forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from vopd.method import Scorer

Component = tuple[str, float]
"""(name of a weight store, coefficient of its log-probs in the scorer's distribution)."""
Pair = tuple[torch.Tensor, torch.Tensor]
"""The same shard of student and teacher."""
PIECE = 2**22  # numbers that change places at a time: 16 MiB


def components(scorer: Scorer) -> tuple[Component, ...]:
    """The weight stores a scorer mixes; coefficients add up to one (geometric mixture, then normalised)."""
    if scorer.weights == "trust_region":
        return (("initial", 1.0 - scorer.rate), ("current", scorer.rate))
    if scorer.weights == "ema":
        return ((f"ema:{scorer.rate}", 1.0),)
    return ((scorer.weights, 1.0),)


def stores(scorers: Iterable[Scorer]) -> tuple[str, ...]:
    """Names of all distinct stores that these scorers read, `current` included, in a fixed order."""
    return tuple(sorted({name for scorer in scorers for name, _ in components(scorer)}))


def local(parameter: torch.Tensor) -> torch.Tensor:
    """The shard of a parameter that this rank owns (the tensor itself where it is not sharded)."""
    data = parameter.detach()
    return data.to_local() if hasattr(data, "to_local") else data


def settle() -> None:
    """Wait for copies between host and GPU: verl moves offloaded weights without waiting for them."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class TeacherWeights:
    """All weight stores but `current`, as {store: {parameter name: fp32 shard}}.

    A shard stays where it was made: beside the student's, in pinned memory of the host, or on the host because the
    student lay there when it was read (verl's `param_offload`).

    Args:
        module: the (sharded) student; read at construction, so make this before the first update.
        names: stores to keep, e.g. `("ema:0.05", "initial")`.
        on_host: keep them in the host's memory, pinned where the student is on a GPU.
    """

    def __init__(self, module: nn.Module, names: Iterable[str], on_host: bool = False) -> None:
        settle()
        copied = _on_host if on_host else _beside
        self.shards: dict[str, dict[str, torch.Tensor]] = {
            name: {key: copied(local(p)) for key, p in module.named_parameters()}
            for name in names
            if name != "current"
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """theta_T <- (1 - rate) theta_T + rate theta_S for every ema store; call after an applied step only.

        Computed where the teacher's shard is.
        """
        settle()
        for name, shards in self.shards.items():
            if not name.startswith("ema:"):
                continue
            rate = float(name.removeprefix("ema:"))
            for key, parameter in module.named_parameters():
                shard = shards[key]
                shard.lerp_(local(parameter).to(shard.device, shard.dtype), rate)

    @contextmanager
    def in_place_of(self, module: nn.Module, name: str) -> Iterator[None]:
        """Within the block the module holds store `name`; the student's weights come back afterwards.

        Values are exchanged, not copied: with an fp32 student the exchange is exact. An error inside the block leaves
        it as it is, also where the way back fails (a GPU in error refuses all work).

        Raises:
            TypeError: the student's weights are not fp32; nothing was exchanged.
        """
        if name == "current":
            yield
            return
        pairs = self._pairs(module, name)
        buffer = _Buffer()
        buffer.exchange(pairs)
        try:
            yield
        except BaseException as error:
            try:
                buffer.exchange(pairs)
            except RuntimeError as second:
                error.add_note(f"The student's weights could not be put back: {second}")
            raise
        buffer.exchange(pairs)

    def _pairs(self, module: nn.Module, name: str) -> list[Pair]:
        """Student and teacher shard of every parameter, as they are now.

        Taken once for both ways: an error in the model's forward leaves FSDP2's gathered parameters, of another type
        and shape, where the shards were.
        """
        pairs = []
        for key, parameter in module.named_parameters():
            student = local(parameter)
            if student.dtype != torch.float32:
                raise TypeError(f"{key} is {student.dtype}; keep the student's master weights in fp32.")
            pairs.append((student, self.shards[name][key]))
        return pairs


class _Buffer:
    """Memory through which two tensors change values piece by piece; held from the way in to the way back.

    The way back needs no memory of its own, and so works where the block ran out of it.
    """

    def __init__(self) -> None:
        self._pieces: dict[torch.device, torch.Tensor] = {}

    @torch.no_grad()
    def exchange(self, pairs: Iterable[Pair]) -> None:
        settle()
        for student, teacher in pairs:
            for left, right in zip(*_cut(student, teacher), strict=True):
                kept = self._kept(left)
                left.copy_(right)
                right.copy_(kept)

    def _kept(self, values: torch.Tensor) -> torch.Tensor:
        """A copy, in the buffer where it fits."""
        if values.numel() > PIECE:
            return values.clone()
        if values.device not in self._pieces:
            self._pieces[values.device] = values.new_empty(PIECE)
        return self._pieces[values.device][: values.numel()].view(values.shape).copy_(values)


def _beside(shard: torch.Tensor) -> torch.Tensor:
    return shard.to(torch.float32, copy=True)


def _on_host(shard: torch.Tensor) -> torch.Tensor:
    copy = shard.to("cpu", torch.float32, copy=True)
    return copy.pin_memory() if shard.is_cuda else copy


def _cut(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Views of at most PIECE numbers; a tensor with gaps or another order in memory stays whole."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(-1).split(PIECE) for tensor in tensors]
    return [(tensor,) for tensor in tensors]
