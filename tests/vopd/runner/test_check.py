"""`vopd check` prints what a run would take before it says what would stop it; a run refuses what is too small."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from vopd.common import environment_checks, gpu_checks, library_environment
from vopd.common.gpu_checks import GIB, Gpu
from vopd.errors import UserError
from vopd.runner import check, check_report, run
from vopd.runner.run import Run

BASE = Path(__file__).parents[3] / "data" / "miniature" / "base"
GPUS = "profile=qwen3_5_4b_8gpu"


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOPD_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(environment_checks, "cuda_devices", lambda: 0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that holds nothing but config.json."""
    folder = tmp_path / "shape"
    folder.mkdir()
    (folder / "config.json").write_text((BASE / "config.json").read_text())
    return folder


def test_without_a_gpu_the_whole_estimate_comes_before_the_refusal(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main(["vision_opd", GPUS, f"model.path={model}"]) == 2
    told = capsys.readouterr()
    for title in (
        "Parameters", "Per GPU: what stays", "Per GPU: what an update adds", "Per GPU: vLLM", "Main memory of a node",
        "Disk", "Seconds of a step", "Looked at:",
    ):  # fmt: skip
        assert title in told.out, title
    assert "teacher ema:0.05, fp32" in told.out
    assert "768 rows" in told.out
    assert "hardware.device=cuda needs 8 GPUs" in told.err


def test_a_model_that_is_not_within_reach_is_named_and_the_rest_still_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    assert check.main(["vision_opd", GPUS, f"model.path={gone}"]) == 2
    told = capsys.readouterr()
    assert f"No estimate: model.path={gone}: no such folder" in told.out
    assert "config.json alone is enough" in told.out
    assert "Looked at:" in told.out
    assert "needs 8 GPUs" in told.err


def test_another_kind_of_model_has_no_estimate(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert check.main(["grpo", GPUS, f"model.path={model}"]) == 2
    assert "'llama' is none whose memory can be estimated" in capsys.readouterr().out


def test_check_true_among_a_runs_settings_is_the_check(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["vision_opd", "check=true", GPUS, f"model.path={model}"]) == 2
    assert "Seconds of a step" in capsys.readouterr().out
    assert run.check_alone(["vision_opd", "seed=1"]) is None
    assert run.main(["vision_opd", "check=no"]) == 2
    assert "only check=true is known" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("card", "words", "named"),
    [
        (Gpu("card", 80 * GIB, 0, "580.65.06"), (), ""),
        (Gpu("card", 80 * GIB, 0, "400.1"), (), "driver 400.1"),
        (Gpu("card", 1 * GIB, 0, "580.65.06"), (), "an update is estimated"),
        (
            Gpu("card", 80 * GIB, 0, "580.65.06"),
            ("rollout.memory_share=0.99",),
            "smaller rollout.memory_share",
        ),
    ],
)
def test_a_run_refuses_gpus_that_are_too_small_or_too_old(
    card: Gpu, words: tuple[str, ...], named: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_checks, "gpus", lambda visible: [card] * 8)
    monkeypatch.setattr(gpu_checks, "torch_cuda", lambda: "13.0")
    monkeypatch.setattr(environment_checks, "available_memory_gib", lambda: 1e6)
    found = Run("vision_opd", [GPUS, f"model.path={model}", *words], Console(quiet=True))
    if named:
        with pytest.raises(UserError, match=named):
            found._check_size()
    else:
        found._check_size()


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_a_run_refuses_a_machine_with_less_than_the_estimate(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Run("vision_opd", ["train.keep=1000000"] if what == "disk" else [], Console(quiet=True))
    monkeypatch.setattr(environment_checks, "available_memory_gib", lambda: 4.0 if what == "memory" else 1e6)
    with pytest.raises(UserError, match="GiB of memory" if what == "memory" else "GB free"):
        found._check_size()


def test_a_value_that_verl_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in library_environment.variables("cpu").items():
        monkeypatch.setenv(name, value)  # as check_verl does, and taken back afterwards
    key = "verl.actor_rollout_ref.actor"
    with pytest.raises(UserError, match=r"actor_rollout_ref\.actor"):
        check_report.check_verl(Run("grpo", [f"{key}.loss_agg_mode=nothing"], Console(quiet=True)).config)
    check_report.check_verl(Run("grpo", [], Console(quiet=True)).config)
