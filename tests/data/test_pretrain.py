"""The pre-training loop: a killed run resumes to the same weights; every stage gives a finite loss."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.miniature import ceiling, pretrain
from data.miniature.pretrain import Learner, Stage
from vopd.errors import UserError

pytestmark = pytest.mark.slow


class Short(Learner):
    """Two short stages; `dies_at` kills the second one once."""

    dies_at: int | None = None

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.stages = (Stage("text", 2, 1e-3, self.text_loss), Stage("more", 4, 1e-3, self.mortal))

    def mortal(self, step: int) -> torch.Tensor:
        if step == Short.dies_at:
            Short.dies_at = None
            raise KeyboardInterrupt
        return self.text_loss(100 + step)


def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "Learner", Short)
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)
    pretrain.pretrain(tmp_path / "a", seed=1, threads=1)
    Short.dies_at = 3
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(tmp_path / "b", seed=1, threads=1)
    with pytest.raises(UserError, match="belongs to seed 1"):
        pretrain.pretrain(tmp_path / "b", seed=2, threads=1)
    pretrain.pretrain(tmp_path / "b", seed=1, threads=1)
    one, two = (load_file(tmp_path / d / "model.safetensors") for d in "ab")
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not list((tmp_path / "b").glob("*.pt"))


def test_a_folder_or_file_of_someone_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_text("mine")
    assert pretrain.main(["--out", str(tmp_path)]) == 2
    assert "holds model.safetensors, which data.miniature.pretrain did not make" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(UserError, match="is not a result"):
        ceiling.check_place(tmp_path / "model.safetensors")
    ceiling.check_place(tmp_path / "new.json")
    ceiling.check_place(ceiling.BASE.parent / "ceiling.json")


def test_every_stage_gives_a_finite_loss_and_gradient() -> None:
    torch.set_num_threads(1)
    learner = Learner(0)
    for stage in learner.stages:
        learner.modules.zero_grad()
        loss = stage.loss(1)
        loss.backward()
        used = [p for p in learner.modules.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        assert torch.isfinite(loss) and len(used) > 20
