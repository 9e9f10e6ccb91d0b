"""Whose a run folder is, and what may differ when a run is resumed."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from vopd.backbone import checkpoints
from vopd.backbone.run_history import History
from vopd.config import load
from vopd.errors import UserError
from vopd.runner.run_folder import RunFolder, differences, that_matter

SETTINGS: Any = OmegaConf.to_container(load("vision_opd", []))


def run_folder(folder: Path, steps: int = 40, made: int = 0) -> Path:
    """A folder as a run leaves it, with a checkpoint after `made` updates."""
    folder.mkdir(parents=True)
    settings = {**SETTINGS, "train": {**SETTINGS["train"], "steps": steps}}
    RunFolder(folder).write_settings(OmegaConf.create(settings))
    if made:
        with checkpoints.writing(folder / "checkpoints", made) as place:
            (place / "weights").touch()
    return folder


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"notes.txt": "mine"}, "holds notes.txt and no run"),
        ({"config.yaml": "a: 1", "records/x": ""}, "not the settings of a run"),
        ({"config.yaml": "- a\n- b"}, "not the settings of a run"),
        ({"config.yaml": "a: [", "records/x": ""}, "cannot be read"),
        ({"config.yaml": ""}, "not the settings of a run"),
    ],
)
def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, files: dict[str, str], named: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=named):
        RunFolder(tmp_path).settings()
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == set(files)


def test_a_new_an_empty_and_a_runs_own_folder(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "new").settings() is None
    assert RunFolder(tmp_path).settings() is None
    (tmp_path / "started.json").touch()
    assert RunFolder(tmp_path).settings() is None
    assert RunFolder(run_folder(tmp_path / "run")).settings() == SETTINGS
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="this is a file"):
        RunFolder(tmp_path / "file").settings()


@pytest.mark.parametrize("override", ["logging.tensorboard=true", "train.save_minutes=9", "train.keep=3",
                                      "train.steps=50", "evaluate.every=5", "export=float32", "run_dir=elsewhere",
                                      "hardware.memory_gib=1", "data.folder=moved", "model.path=moved",
                                      "rollout.record=true"])  # fmt: skip
def test_settings_that_decide_nothing_may_change(override: str) -> None:
    now = OmegaConf.to_container(load("vision_opd", [override]))
    changed = differences(now, SETTINGS)
    assert changed and that_matter(changed) == []


@pytest.mark.parametrize("override", ["seed=1", "train.lr=1e-5", "method.top_k=7", "rollout.max_response_tokens=30",
                                      "train.prompts=16", "evaluate.test_rows=8", "hardware.device=cuda",
                                      "verl.trainer.balance_batch=false"])  # fmt: skip
def test_settings_that_decide_a_result_may_not(override: str) -> None:
    now = OmegaConf.to_container(load("vision_opd", [override]))
    assert len(that_matter(differences(now, SETTINGS))) == 1


def test_steps_that_were_made_cannot_be_taken_back(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", made=12)
    RunFolder(folder).check_steps(12, ahead=False)
    with pytest.raises(UserError, match=r"train.steps=11.*has made 12 updates"):
        RunFolder(folder).check_steps(11, ahead=False)


def test_rollouts_that_were_generated_ahead_cannot_become_more(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", made=2)
    (folder / "rollouts").mkdir()
    for step in range(1, 5):
        (folder / "rollouts" / f"step{step:06d}.parquet").touch()
    RunFolder(folder).check_steps(4, ahead=True)
    with pytest.raises(UserError, match="rollouts of 4 updates"):
        RunFolder(folder).check_steps(5, ahead=True)


def test_a_finished_run_keeps_its_results_when_it_is_trained_further(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", made=40)
    for name in ("summary.json", "summary.txt", "records/after.jsonl", "model/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    History(folder).add_evaluation({"name": "after", "step": 40})
    RunFolder(folder).reopen(40)
    assert (folder / "summary_step40.json").read_text() == "summary.json"
    assert (folder / "records" / "after_step40.jsonl").exists() and (folder / "model_step40").is_dir()
    assert not (folder / "summary.json").exists() and not (folder / "records" / "after.jsonl").exists()
    assert "after_step40" in (folder / "evaluations.jsonl").read_text()


def test_a_finished_run_without_its_checkpoint_cannot_be_trained_further(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without its last checkpoint"):
        RunFolder(run_folder(tmp_path / "run", made=30)).reopen(40)
