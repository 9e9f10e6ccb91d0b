"""Encoding an image once for all rollouts of its prompt changes neither values nor gradients."""

from types import SimpleNamespace

import torch
from torch import nn

from vopd.backbone.engine import SharedVision
from vopd.backbone.model_inputs import unique_rows


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
