"""What a run on GPUs needs is judged from what nvidia-smi and the machine show."""

from pathlib import Path

import pytest

from vopd.common import gpu_checks
from vopd.common.gpu_checks import GIB, Gpu
from vopd.errors import UserError

ANSWER = """NVIDIA A, 81559, 1024, 580.65.06
NVIDIA A, 81559, 0, 580.65.06
NVIDIA B, [N/A], [N/A], 580.65.06
"""
CARD = Gpu("card", 80 * GIB, 0, "580.65.06")


def refused(check, *args) -> str:
    with pytest.raises(UserError) as caught:
        check(*args)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def test_what_nvidia_smi_prints_is_read_and_a_line_without_figures_left_out() -> None:
    found = gpu_checks.parse(ANSWER)
    assert [gpu.name for gpu in found] == ["NVIDIA A", "NVIDIA A"]
    assert (found[0].memory, found[0].used, found[0].driver) == (81559 * 2**20, 2**30, "580.65.06")


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 2), ("", 2), ("1", 1), ("1,0", 2), ("GPU-abc", 2), ("7", 2)]
)
def test_the_visible_ones_are_judged(visible: str | None, count: int) -> None:
    found = gpu_checks.chosen(gpu_checks.parse(ANSWER), visible)
    assert len(found) == count
    if visible == "1":
        assert found[0].used == 0


def test_no_gpu_is_found_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_checks.gpus(None) == []


def test_nvidia_smi_that_answers_or_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{ANSWER}'\n".replace("\n'", "\\n'"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert len(gpu_checks.gpus("0")) == 1
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_checks.gpus("0") == []


@pytest.mark.parametrize(
    ("driver", "cuda", "old"),
    [
        ("580.65.06", "13.0", False), ("580.65.05", "13.0", True), ("575.1", "13.0", True), ("575.1", "12.8", False),
        ("525.60.13", "12.8", False), ("470.0", "12.8", True), ("470.0", None, False), ("[N/A]", "13.0", False),
    ],
)  # fmt: skip
def test_a_driver_older_than_torchs_cuda_needs_is_refused(driver: str, cuda: str | None, old: bool) -> None:
    gpus = [Gpu("card", GIB, 0, driver)]
    if old:
        assert driver in refused(gpu_checks.check_driver, gpus, cuda)
    else:
        gpu_checks.check_driver(gpus, cuda)


@pytest.mark.parametrize(
    ("gpu", "share", "named"),
    [
        (CARD, 0.5, ""),
        (Gpu("busy", 80 * GIB, 50 * GIB, "580"), 0.5, "50.0 in use"),
        (Gpu("small", 24 * GIB, 0, "580"), 0.5, "train.max_tokens_per_micro_batch"),
        (CARD, 0.9, "smaller rollout.memory_share"),
        (CARD, 0.1, "larger rollout.memory_share"),
    ],
)
def test_a_gpu_without_room_for_the_estimate_is_refused(gpu: Gpu, share: float, named: str) -> None:
    needs = 10 * GIB, 40 * GIB, 12 * GIB, share
    if named:
        assert named in refused(gpu_checks.check_memory, [CARD, gpu], *needs) or gpu is CARD
        assert named in refused(gpu_checks.check_memory, [gpu], *needs)
    else:
        gpu_checks.check_memory([gpu], *needs)


def test_triton_needs_a_compiler_and_pythons_header(tmp_path: Path) -> None:
    header = tmp_path / "Python.h"
    assert "Python.h" in refused(gpu_checks.check_compiler, "/usr/bin/cc", header)
    header.write_text("")
    gpu_checks.check_compiler("/usr/bin/cc", header)
    assert "compiler" in refused(gpu_checks.check_compiler, None, header)


def test_the_compiler_is_cc_where_that_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("mine", "gcc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_checks.compiler({"CC": "mine"}) == str(tmp_path / "mine")
    assert gpu_checks.compiler({"CC": "gone"}) is None
    assert gpu_checks.compiler({}) == str(tmp_path / "gcc")
