"""The comparison with verl's own GRPO: what verl is lent, what is made of both sides' metrics. verl does not run."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from PIL import Image

from benchmarks import against_verl
from benchmarks.against_verl import FACTS, OURS, PHASES, STOCK, Run, run, stock_settings, table
from benchmarks.stock_verl.reward import compute_score
from data import schema
from data.miniature import prepare
from vopd.backbone.verl_config import verl_config
from vopd.config import ROOT, load

PATHS = {"train": "t.parquet", "validation": "v.parquet", "agents": "a.yaml", "ray": "/tmp/ray"}
LENT = ("trainer.v1.sampler.sampler_kwargs.poll_seconds", "ray_kwargs.ray_init._temp_dir")
"""Keys that verl's tree does not have: the first is read by our buffer, the second is Ray's."""


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and value
        found |= leaves(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def test_every_key_that_verl_is_told_otherwise_is_one_of_its_own() -> None:
    ours = verl_config(load("grpo", []))
    own = leaves(OmegaConf.to_container(ours))  # type: ignore[arg-type]
    changed = leaves(stock_settings(3, PATHS))
    assert [key for key in changed if key not in own] == list(LENT)
    assert [key for key, value in changed.items() if own.get(key) == value and key not in LENT] == []


def test_what_decides_the_result_is_left_as_our_run_has_it() -> None:
    ours = verl_config(load("grpo", ["train.prompts=8", "train.rollouts=2"]))
    both = OmegaConf.merge(OmegaConf.to_container(ours), stock_settings(3, PATHS))
    assert (both.data.train_batch_size, both.data.seed, both.data.shuffle) == (8, 0, True)
    actor, rollout = both.actor_rollout_ref.actor, both.actor_rollout_ref.rollout
    assert (rollout.n, rollout.temperature, rollout.response_length) == (2, 1.0, 40)
    assert (actor.optim.lr, actor.optim.lr_warmup_steps, actor.optim.clip_grad) == (3e-5, 5, 1.0)
    assert (actor.ppo_max_token_len_per_gpu, actor.use_kl_loss, actor.clip_ratio) == (32768, False, 0.2)
    assert actor.loss_agg_mode == "seq-mean-token-mean" and both.algorithm.adv_estimator == "grpo"


def test_verl_looks_at_the_queue_as_often_as_our_trainer() -> None:
    trainer = (ROOT / "vopd" / "backbone" / "trainer.py").read_text()  # half a minute to import
    assert f"\nPOLL_SECONDS = {against_verl.POLL_SECONDS} " in trainer


def test_verl_is_given_the_rows_of_the_split_in_their_order_with_the_pixels_of_the_full_view(
    tmp_path: Path,
) -> None:
    split, out = tmp_path / "train.parquet", tmp_path / "verl.parquet"
    rows = list(prepare.rows("train", 3, 0))
    schema.write(rows, split)
    against_verl.write_stock_data(split, out)
    written = pq.read_table(out).to_pylist()
    assert [row["extra_info"]["id"] for row in written] == [row["id"] for row in rows]
    for row, ours in zip(written, rows, strict=True):
        assert row["prompt"] == [{"role": "user", "content": f"<image>{ours['question']}"}]
        (image,) = (np.asarray(Image.open(io.BytesIO(cell["bytes"]))) for cell in row["images"])
        assert (image == np.asarray(Image.open(io.BytesIO(ours["image"]["bytes"])))).all()


def test_the_reward_is_our_parsers() -> None:
    row = next(prepare.rows("train", 1, 0))
    facts = against_verl.stock_row(row, 0, Path())
    other = next(letter for letter in "ABCD" if letter != row["answer"])
    scores = [
        compute_score("miniature", text, facts["reward_model"]["ground_truth"], facts["extra_info"])["score"]
        for text in (f"Answer: {row['answer']}", f"Answer: {other}", "")
    ]
    assert scores == [1.0, 0.0, 0.0]


# ---- what is made of the metrics ------------------------------------------------------------------------------------


def played(side: str, seconds: list[float]) -> Run:
    """A run whose updates took so long, each phase a tenth of the step."""
    place = (OURS, STOCK).index(side)
    lines = [
        {
            both[place]: value if phase == "step" else value / 10
            for phase, both in PHASES.items()
            if both[place]
        }
        | {both[place]: 1.0 for both in FACTS.values()}
        for value in seconds
    ]
    ends = [100.0 + sum(seconds[: i + 1]) for i in range(len(seconds))]
    return run(side, 90.0, ends, lines)  # type: ignore[arg-type]


def test_the_warm_up_and_the_evaluation_behind_the_last_update_are_left_out() -> None:
    one = played(OURS, [50.0, 20.0, 2.0, 4.0, 9.0])
    assert one.start == 60.0 and one.loop == [2.0, 4.0]
    assert against_verl.values([one], OURS, "step") == [2.0, 4.0, 9.0]
    assert one.updates[0]["old log-probs"] == 0.0


def test_a_metric_that_verl_no_longer_writes_is_an_error() -> None:
    with pytest.raises(KeyError, match=re.escape("timing_s/old_log_prob")):
        run(
            STOCK,
            0.0,
            [1.0],
            [{both[1]: 1.0 for name, both in (PHASES | FACTS).items() if name[:3] != "old"}],
        )


def test_the_ratio_is_the_geometric_mean_of_the_rounds() -> None:
    rounds = [
        [played(OURS, [9.0, 9.0, 1.0, 1.0]), played(STOCK, [9.0, 9.0, 2.0, 2.0])],
        [played(STOCK, [9.0, 9.0, 4.0, 4.0]), played(OURS, [9.0, 9.0, 8.0, 8.0])],
    ]
    said = "\n".join(table(rounds))
    assert "Step, ours / verl: 1.000 (rounds: 0.500, 2.000; goal: at most 1.02)" in said
    assert "| step, s | 4.500 | 3.000 | 1.50 |" in said
    assert "| old log-probs, s | 0.000 | 0.300 | - |" in said
    assert "| gradient norm | 1 | 1 | 0.0e+00 |" in said
