"""Two FSDP2 ranks, rollout servers, rollout workers and storage units through the whole stack: agreeing numbers."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vopd.config import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


def test_two_ranks_train_through_the_whole_stack(
    tmp_path: Path, overrides_for: Callable[..., list[str]]
) -> None:
    folder = tmp_path / "run"
    overrides = overrides_for(
        folder,
        "hardware.devices_per_node=2",
        "train.steps=2",
        "verl.actor_rollout_ref.rollout.agent.num_workers=2",
        "verl.transfer_queue.backend.SimpleStorage.num_data_storage_units=2",
    )
    command = [sys.executable, "-P", "-m", "vopd", "run", "vision_opd", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900)
    log = folder / "log.txt"
    assert done.returncode == 0, done.stderr + (
        log.read_text(errors="replace")[-6000:] if log.exists() else ""
    )
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert line["rollouts"] == 16 and line["skipped_updates"] == 0
        assert line["images_encoded"] == 2 * line["prompts"]  # by student and teacher, on one rank alone
        assert all(math.isfinite(v) for v in line.values() if isinstance(v, int | float))
    assert all(abs(line["rollout/k3"]) < 1e-6 for line in steps)
    shards = folder / "checkpoints" / "global_step_2" / "actor"
    names = {f"{kind}_rank_{rank}.safetensors" for kind in ("weights", "teacher_ema_0.05") for rank in (0, 1)}
    assert names <= {f.name for f in shards.iterdir()}
    assert (folder / "model" / "model.safetensors").is_file()
