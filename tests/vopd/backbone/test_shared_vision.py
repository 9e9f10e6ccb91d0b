"""Encoding an image once for all rollouts of its prompt changes neither values nor gradients."""

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vopd.backbone.engine import SharedVision
from vopd.backbone.model_inputs import together, unique_rows


class Tower(nn.Module):
    """A vision tower as the engine sees one: patches in, `pooler_output` out, 4 patches a token."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4 * 3, 5)
        self.patches_seen = 0

    def forward(self, patches: torch.Tensor) -> SimpleNamespace:
        self.patches_seen += len(patches)
        return SimpleNamespace(pooler_output=self.project(patches.reshape(-1, 12)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.visual = Tower()
        self.config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))


def test_unique_rows() -> None:
    assert unique_rows(["a", "a", "b", "a"]) == ([0, 2], [0, 0, 1, 0])
    assert unique_rows([]) == ([], [])


def test_values_and_gradients_are_those_of_encoding_every_row() -> None:
    torch.manual_seed(0)
    model = Model()
    tower = model.model.visual
    shared = SharedVision(model)
    images = [torch.randn(8, 3), torch.randn(16, 3)]
    rows = [0, 0, 1, 0]
    weights = torch.randn(sum(len(images[i]) // 4 for i in rows), 5)

    plain = tower(torch.cat([images[i] for i in rows])).pooler_output
    (plain * weights).sum().backward()
    gradient = tower.project.weight.grad.clone()
    tower.zero_grad()
    tower.patches_seen = 0

    grids = [{"image_grid_thw": torch.tensor([[1, 2, 4]])}, {"image_grid_thw": torch.tensor([[1, 4, 4]])}]
    with shared.shared(rows, grids):
        once = tower(torch.cat(images)).pooler_output
    (once * weights).sum().backward()

    assert tower.patches_seen == 24
    torch.testing.assert_close(once, plain)
    torch.testing.assert_close(tower.project.weight.grad, gradient)


def test_outside_the_block_the_tower_is_left_alone() -> None:
    model = Model()
    SharedVision(model)
    assert len(model.model.visual(torch.randn(8, 3)).pooler_output) == 2


@given(st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(1, 400), st.randoms())
def test_rows_that_a_micro_batch_can_take_together(
    prompts: int, rollouts: int, limit: int, random: Any
) -> None:
    names = [prompt for prompt in range(prompts) for _ in range(rollouts)]
    lengths = [random.randint(1, 100) for _ in names]
    found = together(names, lengths, limit)
    assert rollouts % found == 0
    if found > 1:
        assert all(sum(lengths[i : i + found]) <= limit for i in range(0, len(names), found))
    larger = [d for d in range(found + 1, rollouts + 1) if rollouts % d == 0]
    for d in larger:
        assert any(sum(lengths[i : i + d]) > limit for i in range(0, len(names), d))


def test_prompts_with_different_numbers_of_rollouts_are_cut_anywhere() -> None:
    assert together(["a", "a", "b"], [1, 1, 1], 100) == 1
