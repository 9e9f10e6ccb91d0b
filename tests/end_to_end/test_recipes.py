"""Every recipe through the real stack for two updates each, and recipes that live outside the repository.

What is asserted of each is what makes it that method: who generated, what was discarded, what was kept, which teacher
was asked. That the objective is right is shown elsewhere, against independent computations.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from vopd.config import ROOT
from vopd.evaluation.records import read_records

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

Overrides = Callable[..., list[str]]
SECONDS = 900


def run(recipe: str, overrides: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "vopd", "run", recipe, *overrides]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=SECONDS)


def short(overrides_for: Overrides, folder: Path, *more: str) -> list[str]:
    """Two updates of 8 prompts x 4."""
    return overrides_for(folder, "train.steps=2", "train.rollouts=4", *more)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def told(done: subprocess.CompletedProcess[str], folder: Path) -> str:
    log = folder / "log.txt"
    return done.stderr + (log.read_text(errors="replace")[-6000:] if log.exists() else "")


def trained(recipe: str, overrides: list[str], folder: Path) -> list[dict[str, Any]]:
    """Run a recipe; the lines of its metrics."""
    done = run(recipe, overrides)
    assert done.returncode == 0, told(done, folder)
    return checked(folder)


def checked(folder: Path) -> list[dict[str, Any]]:
    """The lines of a finished run's metrics; what holds for every recipe is asserted here."""
    steps = lines(folder)
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert [k for k, v in line.items() if isinstance(v, int | float) and not math.isfinite(v)] == []
        assert line["prompts"] == 8 and line["rollouts"] == 32 and line["skipped_updates"] == 0
        assert line["updates"] == 1 and line["grad_norm"] > 0
        assert line["entropy"] > 0 and line["log_prob"] < 0
        assert {"collapse/length", "collapse/entropy", "collapse/divergence"} <= line.keys()
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["run"]["method"]) == {"anchor", "objective", "normalisation", "clip"}
    assert summary["cost"]["updates"] == 2 and summary["cost"]["prompts"] == 16
    assert summary["cost"]["tokens_generated"] == sum(line["tokens_generated"] for line in steps)
    return steps


def agrees(steps: list[dict[str, Any]]) -> bool:
    """Rollout and trainer give the sampled tokens the same probability."""
    return all(abs(line["rollout/k3"]) < 1e-6 for line in steps)


@pytest.fixture(scope="module")
def grpo(tmp_path_factory: pytest.TempPathFactory, overrides_for: Overrides) -> Path:
    folder = tmp_path_factory.mktemp("grpo") / "run"
    steps = trained("grpo", short(overrides_for, folder, "rollout.record=true"), folder)
    assert agrees(steps)
    assert all(line["scorer_tokens"] == 0 and line["tokens_evicted"] == 0 for line in steps)
    assert all(line["reward"] == pytest.approx(line["rollout_accuracy"]) for line in steps)
    assert any(line["mixed_groups"] > 0 for line in steps)
    return folder


def test_grpo_replayed_from_its_recording_makes_the_same_updates(
    grpo: Path, tmp_path: Path, overrides_for: Overrides
) -> None:
    assert sorted(f.name for f in (grpo / "rollouts").iterdir()) == [
        "step000001.parquet",
        "step000002.parquet",
    ]
    folder = tmp_path / "run"
    replayed = trained("grpo", short(overrides_for, folder, f"rollout.replay={grpo / 'rollouts'}"), folder)
    for first, second in zip(lines(grpo), replayed, strict=True):
        for key in ("loss", "grad_norm", "log_prob", "entropy", "tokens_generated", "rollout_accuracy"):
            assert second[key] == pytest.approx(first[key], rel=1e-6, abs=1e-9), key


def test_dapo_evicts_groups_and_draws_new_ones(tmp_path: Path, overrides_for: Overrides) -> None:
    folder = tmp_path / "run"
    steps = trained("dapo", short(overrides_for, folder, "rollout.record=true"), folder)
    assert agrees(steps)
    assert all(line["mixed_groups"] == 1.0 for line in steps)
    assert sum(line["prompts_evicted"] for line in steps) >= 1
    for line in steps:
        assert line["rollouts_evicted"] == 4 * line["prompts_evicted"]
        assert line["tokens_evicted"] >= line["rollouts_evicted"]
        kept = sum(map(len, pq.read_table(folder / "rollouts" / f"step{line['step']:06d}.parquet")["tokens"]))
        assert line["tokens_generated"] == kept + line["tokens_evicted"] + line["tokens_surplus"]
    # At least one refill, and the checkpoint's place in the stream counts it. The evaluation before training numbers
    # its requests too, where its answers are not kept from another run.
    state = json.loads((folder / "checkpoints" / "global_step_2" / "trainer.json").read_text())
    taken = sum(line["prompts"] + line["prompts_evicted"] + line["prompts_surplus"] for line in steps)
    assert taken > 16 and state["prompts_drawn"] - taken in (0, 24 * 2 + 12)


def test_a_policy_that_is_always_wrong_ends_dapo_with_a_sentence(
    tmp_path: Path, overrides_for: Overrides
) -> None:
    """Nobody answers within two tokens."""
    folder = tmp_path / "run"
    done = run("dapo", short(overrides_for, folder, "train.max_refills=2", "rollout.train_share=0.05"))
    assert done.returncode == 1, told(done, folder)
    assert "all correct or all incorrect" in done.stderr and "train.max_refills" in done.stderr
    assert not (folder / "summary.json").exists()


# ---- a series of runs and its comparison -----------------------------------------------------------------------------

SERIES = ("sft_self_teacher", "opsd", "opsd_original")


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory, overrides_for: Overrides) -> Path:
    """Three recipes by one command; the folder of its runs."""
    top = tmp_path_factory.mktemp("series")
    overrides = [override for override in short(overrides_for, top) if not override.startswith("run_dir=")]
    command = ["bash", str(ROOT / "scripts" / "compare.sh"), *SERIES, "seeds=0", *overrides]
    env = {**os.environ, "VOPD_RUNS": str(top / "runs")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=top, timeout=3 * SECONDS, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "run 3 of 3: opsd_original, seed 0" in done.stdout
    made = top / "runs" / "miniature"
    table = (made / "report" / "table.md").read_text()
    assert [name for name in (*SERIES, "base (before training)") if f"| {name} |" not in table] == []
    return made


def test_sft_generates_first_and_trains_on_what_is_correct(series: Path) -> None:
    folder = series / "sft_self_teacher" / "seed0"
    steps = checked(folder)
    assert len(list((folder / "rollouts").glob("*.parquet"))) == 2
    for line in steps:
        assert 0 < line["update_rows"] <= line["rollouts"] * line["rollout_accuracy"]
        assert "rollout/k3" not in line  # another view's policy generated: nothing to agree with
    summary = json.loads((folder / "summary.json").read_text())
    kept = sum(line["update_rows"] for line in steps)
    assert summary["cost"]["rows_trained"] == kept and summary["cost"]["kept_share"] == kept / 64
    progress = [json.loads(x) for x in (folder / "progress.jsonl").read_text().splitlines()]
    kinds = [event["kind"] for event in progress]
    assert kinds.index("generation") < kinds.index("step")


@pytest.mark.parametrize("recipe", ["opsd", "opsd_original"])
def test_opsd_asks_a_hinted_teacher(recipe: str, series: Path) -> None:
    folder = series / recipe / "seed0"
    steps = checked(folder)
    assert agrees(steps)
    assert all(line["scorer_tokens"] > 0 for line in steps)
    # Entries clipped from above only can add up to less than nothing: the original's divergence is none.
    assert all(
        line["divergence"] > 0 or (recipe == "opsd_original" and line["divergence"] != 0) for line in steps
    )
    before = read_records(folder / "records" / "before.jsonl").records
    assert sum(r.view == "answer_hint" for r in before) == 24


def test_a_run_inside_a_series_equals_the_same_run_alone(
    series: Path, tmp_path: Path, overrides_for: Overrides
) -> None:
    """To the last bit: the same tokens, numbers and weights."""
    folder, inside = tmp_path / "run", series / "opsd" / "seed0"
    alone = trained("opsd", short(overrides_for, folder), folder)
    for first, second in zip(lines(inside), alone, strict=True):
        for key in ("loss", "divergence", "grad_norm", "log_prob", "tokens_generated", "rollout_accuracy"):
            assert first[key] == second[key], key
    weights = [load_file(f / "model" / "model.safetensors") for f in (inside, folder)]
    assert weights[0].keys() == weights[1].keys()
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []
    answers = [read_records(f / "records" / "after.jsonl").records for f in (inside, folder)]
    assert [r.response for r in answers[0]] == [r.response for r in answers[1]]


def test_a_teacher_that_sees_what_the_student_sees_starts_at_rounding_level(
    tmp_path: Path, overrides_for: Overrides
) -> None:
    folder = tmp_path / "run"
    done = run("controls/vision_opd_full_teacher", short(overrides_for, folder))
    assert done.returncode == 0, told(done, folder)
    first, _ = lines(folder)
    assert abs(first["loss"]) < 1e-7 and first["grad_norm"] < 1e-4


# ---- recipes outside the repository ----------------------------------------------------------------------------------

HEAD = """
from dataclasses import dataclass
import torch
from vopd.method import Method, Rollout, Scorer, sequence_mean

@dataclass
class Settings:
    pass

class Outside(Method):
    def record(self):
        return {"anchor": "x", "objective": "x", "normalisation": "x", "clip": "none"}

    def score(self, chunk):
        student = chunk.student_logits_CV.log_softmax(-1)
        kls = [t.log_softmax(-1) for t in chunk.scorer_logits.values()]
        divergence = sum((t.exp() * (t - student)).sum(-1) for t in kls)
        return {"divergence": divergence}

    def loss(self, per_token, mask_BT, batch):
        return sequence_mean(per_token["divergence"], mask_BT, batch)
"""
TEACHER = "scorers={'a': Scorer('crop', 'initial')}"
OUTSIDE = {
    "two_scorers": """
def build(settings):
    scorers = {"a": Scorer("crop", "trust_region", 0.05), "b": Scorer("full", "initial")}
    return Outside(outputs=("divergence",), scorers=scorers)
""",
    "group_weights": f"""
class Weighted(Outside):
    def prepare(self, rollouts):
        z = rollouts.rewards_B - rollouts.lengths_B / rollouts.limit
        groups = z.view(-1, 4)
        return {{"weights": 4 * groups.softmax(-1).flatten()}}

def build(settings):
    return Weighted(outputs=("divergence",), {TEACHER})
""",
    "custom_aggregation": f"""
class LongestFirst(Outside):
    def prepare(self, rollouts):
        return {{"advantages": rollouts.rewards_B - 0.5, "kept": ~rollouts.truncated_B}}

    def loss(self, per_token, mask_BT, batch):
        assert batch.advantages_BT.shape == mask_BT.shape and batch.kept_B.dtype == torch.bool
        place_T = torch.arange(mask_BT.shape[1], 0, -1)
        values = per_token["divergence"] * place_T * (1 + batch.advantages_BT.abs())
        return (values * mask_BT).sum() * batch.ranks / max(batch.tokens, 1)

def build(settings):
    return LongestFirst(outputs=("divergence",), {TEACHER})
""",
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_recipe_outside_the_repository_trains(name: str, tmp_path: Path, overrides_for: Overrides) -> None:
    recipe, folder = tmp_path / f"{name}.yaml", tmp_path / "run"
    recipe.write_text(f"method:\n  module: {name}.py\n")
    (tmp_path / f"{name}.py").write_text(f'"""A recipe of its own."""\n{HEAD}{OUTSIDE[name]}')
    overrides = ["bash", str(ROOT / "scripts" / "run_recipe.sh"), str(recipe), *short(overrides_for, folder)]
    done = subprocess.run(
        overrides, capture_output=True, text=True, cwd=tmp_path, timeout=SECONDS, env=os.environ.copy()
    )
    assert done.returncode == 0, told(done, folder)
    steps = lines(folder)
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["grad_norm"] > 0 and math.isfinite(line["loss"]) for line in steps)
    views = 2 if name == "two_scorers" else 1
    assert all(line["scorer_tokens"] > views * line["tokens_generated"] for line in steps)
