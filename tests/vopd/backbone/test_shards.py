"""One rank's part of a checkpoint: it comes back bit by bit, on other ranks by its rows, and holds no pickle."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vopd.backbone import shards
from vopd.errors import UserError
from vopd.teacher import TeacherWeights


class State:
    """A small model after some updates."""

    def __init__(self, updates: int = 0, width: int = 5, teachers: tuple[str, ...] = ("ema:0.05",)) -> None:
        torch.manual_seed(7)
        self.module = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
        self.module[1].eval()
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1, (step + 1) / 4))
        self.teachers = TeacherWeights(self.module, teachers)
        for _ in range(updates):
            self.update()

    def update(self) -> None:
        self.optimizer.zero_grad()
        (self.module(torch.randn(4, 3)).square().sum() * random.random() * np.random.rand()).backward()
        self.optimizer.step()
        self.schedule.step()
        self.teachers.update(self.module)

    def parts(self) -> shards.State:
        return shards.State(self.module, self.optimizer, self.schedule, self.teachers.shards)

    def numbers(self) -> dict[str, torch.Tensor]:
        found = dict(self.module.state_dict())
        for place, state in self.optimizer.state_dict()["state"].items():
            found |= {f"{place}/{key}": value for key, value in state.items()}
        for store, tensors in self.teachers.shards.items():
            found |= {f"{store}/{key}": value for key, value in tensors.items()}
        return found | {"lr": torch.tensor(self.optimizer.param_groups[0]["lr"], dtype=torch.float64)}


def same(first: State, second: State) -> bool:
    a, b = first.numbers(), second.numbers()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("updates", [0, 3])
def test_the_next_updates_are_the_same_to_the_bit(tmp_path: Path, updates: int) -> None:
    through = State(updates)
    shards.save(tmp_path, 0, 1, through.parts())
    for _ in range(2):
        through.update()
    resumed = State()
    random.seed(0), np.random.seed(0)
    shards.load(tmp_path, 0, 1, resumed.parts())
    for _ in range(2):
        resumed.update()
    assert same(through, resumed)


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    shards.save(tmp_path, 0, 1, State(1).parts())
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: State(width=6), "has the shape"),
        (lambda: State(teachers=("initial",)), "belongs to another method"),
    ],
)
def test_a_checkpoint_of_another_model_or_method_is_refused(
    tmp_path: Path, other: Callable[[], State], said: str
) -> None:
    shards.save(tmp_path, 0, 1, State(1).parts())
    with pytest.raises(UserError, match=said):
        shards.load(tmp_path, 0, 1, other().parts())


def test_parameters_that_only_one_side_has_are_refused(tmp_path: Path) -> None:
    state = State(1)
    shards.save(tmp_path, 0, 1, state.parts())
    less, more = State(), State()
    less.module[2] = nn.Identity()
    with pytest.raises(UserError, match="in the checkpoint but not in the model"):
        shards.load(tmp_path, 0, 1, less.parts())
    more.module.append(nn.Linear(2, 2))
    with pytest.raises(UserError, match="is not in the checkpoint"):
        shards.load(tmp_path, 0, 1, more.parts())


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a checkpoint of vopd"):
        shards.saved_ranks(tmp_path)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
def test_other_ranks_take_their_own_rows(rows: int, saved: int, ranks: int) -> None:
    """What the readers of all ranks hold, put together, is the tensor; each has what FSDP2 would give it."""
    tensor = torch.arange(rows * 2.0).view(rows, 2)
    cut = frozenset(["w"])
    mine = [shards._Reader(Path(), rank, ranks, saved, cut)._mine("w", tensor) for rank in range(ranks)]
    assert torch.equal(torch.cat(mine), tensor)
    expected = [part.shape[0] for part in tensor.chunk(ranks)]
    assert [len(part) for part in mine] == expected + [0] * (ranks - len(expected))


def test_shards_are_put_together_and_whole_tensors_taken_once(tmp_path: Path) -> None:
    cut = frozenset(["w"])
    for rank in range(2):
        tensors = {
            "w": torch.full((2, 2), float(rank)),
            "buffer": torch.ones(3),
            "exp_avg/w": torch.ones(2, 2),
        }
        shards._write(shards.file_of(tmp_path, "weights", rank), tensors, cut)
        (tmp_path / f"rank_{rank}.json").write_text(json.dumps({"ranks": 2}))
    whole = dict(shards.whole(tmp_path, "weights"))
    assert whole["w"].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert (whole["buffer"].shape, whole["exp_avg/w"].shape) == ((3,), (4, 2))
