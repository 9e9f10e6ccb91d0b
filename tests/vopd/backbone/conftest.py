"""Fixtures that play the cases of engine_case.py once per number of ranks and hand out what they saved."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

os.environ.setdefault("VERL_PLATFORM", "cpu")  # read when verl is first imported

SCRIPT = Path(__file__).with_name("engine_case.py")
ON_TWO_RANKS = ("micro_batches", "reduce_once", "packing", "ema_one", "non_finite", "checkpoint")


@pytest.fixture(scope="session")
def engine_case() -> ModuleType:
    """engine_case.py as a module: its rows, responses and tiny model."""
    spec = importlib.util.spec_from_file_location("vopd_engine_case", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def engine_folder(engine_case: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model, tied and untied."""
    folder = tmp_path_factory.mktemp("engine")
    for name in ("tied", "untied"):
        engine_case.make_model(folder / name, tied=name == "tied")
    return folder


def _play(folder: Path, ranks: int, names: tuple[str, ...]) -> Callable[[str], dict[str, Any]]:
    def command(rank: int) -> subprocess.Popen[bytes]:
        with open(folder / f"log.{ranks}.{rank}", "wb") as log:
            return subprocess.Popen(
                [sys.executable, str(SCRIPT), str(folder), *names],
                env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(ranks)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    codes = [process.wait() for process in [command(rank) for rank in range(ranks)]]
    for rank, code in enumerate(codes):
        assert code == 0, (folder / f"log.{ranks}.{rank}").read_text()[-4000:]

    def result(name: str, rank: int = 0) -> dict[str, Any]:
        return torch.load(folder / f"{name}.{ranks}.{rank}.pt", weights_only=True)

    return result


@pytest.fixture(scope="session")
def one_rank(engine_folder: Path) -> Callable[..., dict[str, Any]]:
    """`one_rank(case)`: what the case saved, played in the real engine on one rank."""
    return _play(engine_folder, 1, ())


@pytest.fixture(scope="session")
def two_ranks(engine_folder: Path) -> Callable[..., dict[str, Any]]:
    """`two_ranks(case, rank)`: the same on two gloo ranks."""
    return _play(engine_folder, 2, ON_TWO_RANKS)


# ---- assertions shared by one and two ranks, and by tests and their twins --------------------------------------------


@pytest.fixture
def check_teacher_is_student() -> Callable[[dict[str, Any]], None]:
    def check(played: dict[str, Any]) -> None:
        assert played["stored"] == played["parameters"]
        for part in ("embed_tokens", "language_model.norm", "visual.patch_embed", "A_log"):
            assert any(part in name for name in played["moved"]), part
        assert all(moved > 0 for moved in played["moved"].values()), (
            "a tensor that never moves proves nothing"
        )
        assert {name: apart for name, apart in played["apart"].items() if apart > 0} == {}

    return check


@pytest.fixture
def check_same_update() -> Callable[[dict[str, Any], dict[str, Any], str], None]:
    def check(played: dict[str, Any], wanted: dict[str, Any], suffix: str) -> None:
        for mode in ("packed", "padded"):
            for tokens in (80, 160, 4096):
                got = played[f"{mode}/{tokens}{suffix}"]
                assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
                assert got["grads"].keys() == wanted["grads"].keys()
                for name, grad in wanted["grads"].items():
                    assert (got["grads"][name] - grad).norm() <= 1e-5 * grad.norm(), (mode, tokens, name)

    return check


@pytest.fixture
def check_packing() -> Callable[[dict[str, Any], str], None]:
    def check(played: dict[str, Any], mode: str) -> None:
        assert len(played[mode]) > 1, "one sequence alone cannot leak into another"
        for i, numbers in played["padded"].items():
            for name, values_R in numbers.items():
                torch.testing.assert_close(played[mode][i][name], values_R, rtol=0, atol=2e-5)

    return check


@pytest.fixture
def check_resumed() -> Callable[[dict[str, Any], str], None]:
    def check(played: dict[str, Any], name: str) -> None:
        for through, resumed in zip(played["through"], played[name], strict=True):
            assert all(torch.equal(through[k], resumed[k]) for k in through)

    return check


@pytest.fixture
def check_skipped() -> Callable[[dict[str, Any]], None]:
    def check(played: dict[str, Any]) -> None:
        for rank in played["ranks"]:
            assert rank == {
                "skipped": [1.0],
                "student_moved": False,
                "teacher_moved": False,
                "skipped_then": [0.0],
                "student_moved_then": True,
            }

    return check
