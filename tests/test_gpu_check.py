"""`benchmarks.gpu_check`: its parts hold on a CPU, a defect is seen, and a part that fails does not stop the next."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_check, gpu_parts
from benchmarks.gpu_parts import FLOAT32_SUMS, Row
from vopd.backbone.projection import Projection
from vopd.config import ROOT, load

ALONE = ("delta_rule", "products", "head_values")
LINE = {"skipped_updates": 0.0, "rollout/k3": 1e-9, "grad_norm": 1.0, "perf/cpu_memory_used_gb": 5.0}


@pytest.mark.parametrize("name", ALONE)
def test_numbers_hold_on_a_cpu(name: str) -> None:
    rows = list(gpu_check.PARTS[name][0]("cpu"))
    limited = [row for row in rows if row.limit is not None]
    assert len(limited) >= 2
    assert [row for row in limited if not row.holds()] == []


def test_twin_a_rule_with_another_decay_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = gpu_parts.gated_delta_rule

    def wrong(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        return rule(q, k, v, 1.001 * g, beta)

    monkeypatch.setattr(gpu_parts, "gated_delta_rule", wrong)
    rows = [row for row in gpu_parts.delta_rule("cpu") if row.limit is not None]
    assert rows and not any(row.holds() for row in rows)


def test_twin_a_product_that_is_rounded_to_bfloat16_is_over_the_limit_of_float32_sums() -> None:
    class Rounded(Projection):
        def _matmul(self, left: Tensor, right: Tensor, result: Tensor) -> None:
            result.copy_((left @ right).bfloat16())

    torch.manual_seed(0)
    hidden_NH, weight_VH = torch.randn(16, 32), torch.randn(300, 32)
    errors = {}
    for kind in (Projection, Rounded):
        rows = gpu_parts.product_errors(kind(hidden_NH, weight_VH), hidden_NH, weight_VH)
        errors[kind] = [row.value for row in rows if "weight" not in row.name]
    assert all(error is not None and error < FLOAT32_SUMS for error in errors[Projection])
    assert all(error is not None and error > FLOAT32_SUMS for error in errors[Rounded])


def test_a_number_that_is_none_holds_without_a_limit_alone() -> None:
    assert Row("x", None, "left out").holds()
    assert Row("x", 1.0, "", 1.0).holds()
    assert not Row("x", math.nan, "", 1.0).holds()
    assert not Row("x", 1.1, "", 1.0).holds()


def test_a_run_with_a_missing_or_skipped_update_or_apart_from_its_rollout_is_seen() -> None:
    def wrong(*lines: dict[str, float], device: str = "cpu") -> list[str]:
        return [row.name for row in gpu_parts.run_rows(list(lines), device) if not row.holds()]

    assert wrong(LINE, LINE) == []
    assert wrong(LINE) == ["updates that are missing"]
    assert wrong(LINE | {"skipped_updates": 1.0}, LINE) == ["updates skipped"]
    assert wrong(LINE, LINE | {"rollout/k3": 2e-5}) == ["k3 of rollout and trainer"]
    cuda = LINE | {"rollout/k3": 2e-5, "perf/max_memory_allocated_gb": 1.0}
    assert wrong(cuda, cuda, device="cuda") == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("recipe", ["vision_opd", "grpo"])
def test_the_settings_of_its_runs_are_taken(recipe: str, device: str, tmp_path: Path) -> None:
    config = load(recipe, gpu_parts.run_settings(tmp_path, device))
    assert (config.hardware.device, config.train.steps) == (device, 2)


def test_a_part_that_is_late_or_fails_is_told_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gpu_check.PARTS, "products", (gpu_parts.products, 0.01))
    monkeypatch.setitem(gpu_check.PARTS, "delta_rule", (gpu_parts.delta_rule, 60))
    out = tmp_path / "found" / "check.json"
    late, fine = gpu_check.check("cpu", ["products", "delta_rule"], out)
    assert late["state"].startswith("took longer") and late["rows"] == []
    assert fine["state"] == "ok" and len(fine["rows"]) > 5
    assert [part["part"] for part in json.loads(out.read_text())["parts"]] == ["products", "delta_rule"]
    assert "| delta_rule | ours, float32: output |" in capsys.readouterr().out

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with (tmp_path / "log").open("wb") as log:
        failed = gpu_check.run_part("products", "cuda", 60, log)
    assert failed["state"] == "failed with exit code 1"
    assert "Error" in (tmp_path / "log").read_text()


def test_without_a_gpu_it_says_how_to_run_on_a_cpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check"],
        cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "--device cpu" in done.stderr


@pytest.mark.slow
def test_what_needs_torch_alone_from_the_command(tmp_path: Path) -> None:
    names = ["delta_rule", "products", "kernels", "head_values", "head_time"]
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--parts", *names]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "check.json")],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "check.json").read_text())
    assert [part["part"] for part in found["parts"]] == names
    assert {part["state"] for part in found["parts"]} == {"ok"}


@pytest.mark.slow
def test_the_model_for_a_gpu_is_one(tmp_path: Path) -> None:
    from transformers import Qwen3_5ForConditionalGeneration

    gpu_parts.make_model(tmp_path, "cuda")
    model = Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[9, 10, 11]])).logits
    assert bool(torch.isfinite(logits).all())
    assert model.config.text_config.linear_key_head_dim == 128
