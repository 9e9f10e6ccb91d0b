"""One rank's part of a checkpoint: weights, optimiser, teachers, schedule and random states, without a pickle.

verl's own checkpoint is a set of pickles that only the same number of ranks can read. Here every rank writes its
shards (along dimension 0, as FSDP2 cuts them) as safetensors, and plain numbers as JSON:

    weights_rank_0.safetensors            fp32 master weights of the student, and its buffers
    optimizer_rank_0.safetensors          `<state>/<parameter>`, such as exp_avg/lm_head.weight
    teacher_<store>_rank_0.safetensors    one file a weight store (vopd/teacher.py)
    rank_0.json                           number of ranks, learning rates, schedule, random states

Another number of ranks reads all files of a kind and takes its own rows. On the same number of ranks the state comes
back bit by bit.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from vopd.errors import UserError
from vopd.teacher import local

WEIGHTS, OPTIMIZER = "weights", "optimizer"
CUT = "cut over ranks"
"""In a file's metadata: names of the tensors whose whole is the concatenation over all ranks."""


def teacher_kind(store: str) -> str:
    """The kind of file that holds a teacher's shards; `ema:0.05` is not a valid file name everywhere."""
    return f"teacher_{store.replace(':', '_')}"


def file_of(folder: Path, kind: str, rank: int) -> Path:
    """The file of one kind and rank."""
    return folder / f"{kind}_rank_{rank}.safetensors"


@dataclass(frozen=True)
class State:
    """What a rank holds of a run: `save` reads it, `load` fills it in place.

    teachers: weight store -> name of a parameter -> this rank's shard.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    teachers: Mapping[str, Mapping[str, torch.Tensor]]


def save(folder: Path, rank: int, ranks: int, state: State) -> None:
    """Write this rank's files into `folder`, which exists.

    Raises:
        OSError: the disk is full.
    """
    module, optimizer = state.module, state.optimizer
    cut = _cut(module)
    _write(file_of(folder, WEIGHTS, rank), {name: local(tensor) for name, tensor in _tensors(module)}, cut)
    moments = {
        f"{key}/{name}": local(value)
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }
    _write(file_of(folder, OPTIMIZER, rank), moments, cut)
    for store, shards in state.teachers.items():
        _write(file_of(folder, teacher_kind(store), rank), shards, cut)
    numbers = {
        "ranks": ranks,
        "groups": [{key: group[key] for key in ("lr", "initial_lr")} for group in optimizer.param_groups],
        "schedule": {k: v for k, v in state.schedule.state_dict().items() if k != "lr_lambdas"},
        "random": _random_states(),
    }
    (folder / f"rank_{rank}.json").write_text(json.dumps(numbers), encoding="utf-8")


def load(folder: Path, rank: int, ranks: int, state: State) -> None:
    """Counterpart of `save`; the number of ranks may be another one.

    Raises:
        UserError: the checkpoint is of another model or method.
    """
    module, optimizer = state.module, state.optimizer
    saved = saved_ranks(folder)
    numbers = json.loads((folder / f"rank_{min(rank, saved - 1)}.json").read_text(encoding="utf-8"))
    reader = _Reader(folder, rank, ranks, saved, _cut(module))
    if saved != ranks and any(isinstance(p, DTensor) and p.device_mesh.ndim > 1 for p in module.parameters()):
        raise UserError(
            f"{folder}: written by {saved} ranks; a model that is also replicated cannot take it on {ranks}."
        )
    with torch.no_grad():
        weights = reader.read(WEIGHTS)
        for name, tensor in _tensors(module):
            _copy(weights.pop(name, None), tensor, f"{folder}: weight {name}")
        _refuse_rest(weights, folder)
        for store, shards in state.teachers.items():
            found = reader.read(teacher_kind(store))
            for name, shard in shards.items():
                _copy(found.pop(name, None), shard, f"{folder}: teacher {store}, {name}")
            _refuse_rest(found, folder)
        _load_optimizer(reader.read(OPTIMIZER), module, optimizer, folder)
    for group, values in zip(optimizer.param_groups, numbers["groups"], strict=True):
        group.update(values)
    state.schedule.load_state_dict(numbers["schedule"] | {"lr_lambdas": [None] * len(optimizer.param_groups)})
    if ranks == saved:
        _set_random_states(numbers["random"])


def saved_ranks(folder: Path) -> int:
    """How many ranks wrote a checkpoint; UserError if it was not written by vopd."""
    try:
        return int(json.loads((folder / "rank_0.json").read_text(encoding="utf-8"))["ranks"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: not a checkpoint of vopd ({error}).") from error


def whole(folder: Path, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a kind, shards of all ranks put together, one after another; for an export."""
    files = [file_of(folder, kind, rank) for rank in range(saved_ranks(folder))]
    readers = [safe_open(file, framework="pt") for file in files]
    cut = set(json.loads((readers[0].metadata() or {}).get(CUT, "[]")))
    for name in readers[0].keys():
        parts = [reader.get_tensor(name) for reader in (readers if name in cut else readers[:1])]
        yield name, parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class _Reader:
    """Tensors of a checkpoint as this rank holds them; cut: names of parameters that are cut over the ranks."""

    folder: Path
    rank: int
    ranks: int
    saved: int
    cut: frozenset[str]

    def read(self, kind: str) -> dict[str, torch.Tensor]:
        file = file_of(self.folder, kind, min(self.rank, self.saved - 1))
        if not file.is_file():
            raise UserError(f"{file}: missing; the checkpoint belongs to another method.")
        if self.saved == self.ranks:
            return load_file(file)
        return {name: self._mine(name, tensor) for name, tensor in whole(self.folder, kind)}

    def _mine(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's rows, as FSDP2 cuts them: `torch.chunk` along dimension 0, the last ranks may have none."""
        if tensor.ndim == 0 or not _is_cut(name, self.cut):
            return tensor
        parts = tensor.chunk(self.ranks)
        return parts[self.rank] if self.rank < len(parts) else tensor[:0]


def _cut(module: nn.Module) -> frozenset[str]:
    """Names of the parameters that FSDP2 has cut over the ranks."""
    return frozenset(
        name
        for name, parameter in module.named_parameters()
        if isinstance(parameter, DTensor) and any(isinstance(p, Shard) for p in parameter.placements)
    )


def _is_cut(name: str, cut: frozenset[str]) -> bool:
    """Whether a tensor is cut: a parameter itself, or a state of the optimiser, `<state>/<parameter>`."""
    return name in cut or name.partition("/")[2] in cut


def _load_optimizer(
    state: dict[str, torch.Tensor], module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path
) -> None:
    parameters = dict(module.named_parameters())
    for key, value in state.items():
        what, _, name = key.partition("/")
        if name not in parameters:
            raise UserError(f"{folder}: the optimiser's state has {name}, which the model does not have.")
        parameter = parameters[name]
        slot = torch.zeros_like(parameter, dtype=value.dtype) if value.ndim else torch.zeros_like(value)
        _copy(value, slot, f"{folder}: optimiser, {key}")
        optimizer.state[parameter][what] = slot


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, tied ones once, and the buffers that a checkpoint has."""
    parameters = dict(module.named_parameters())
    yield from parameters.items()
    kept = module.state_dict()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in kept)


def _copy(value: torch.Tensor | None, target: torch.Tensor, what: str) -> None:
    if value is None:
        raise UserError(f"{what} is not in the checkpoint; it belongs to another model.")
    shard = local(target)
    if value.shape != shard.shape:
        raise UserError(f"{what} has the shape {tuple(value.shape)}, not {tuple(shard.shape)}.")
    shard.copy_(value)


def _refuse_rest(rest: Mapping[str, torch.Tensor], folder: Path) -> None:
    if rest:
        raise UserError(f"{folder}: {min(rest)} is in the checkpoint but not in the model.")


def _write(file: Path, tensors: Mapping[str, torch.Tensor], cut: frozenset[str]) -> None:
    names = [name for name, tensor in tensors.items() if tensor.ndim and _is_cut(name, cut)]
    held = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    save_file(held, file, metadata={CUT: json.dumps(names)})


def _random_states() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    states = {
        "torch": _text(torch.get_rng_state()),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        states["cuda"] = _text(torch.cuda.get_rng_state())
    return states


def _set_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(_bytes(states["torch"]))
    np.random.set_state(tuple(states["numpy"]))
    version, numbers, rest = states["python"]
    random.setstate((version, tuple(numbers), rest))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(states["cuda"]))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
