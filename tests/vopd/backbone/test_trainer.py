"""Order of prompts and rows, shares of ranks, and what stops a run."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import create_rl_sampler

from vopd.backbone.trainer import Trainer, TrainingError, _renamed, _sort_key
from vopd.backbone.verl_config import verl_config
from vopd.config import load

# ---- prompts -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trees() -> dict[int, DictConfig]:
    """verl's tree of a run for two seeds."""
    return {seed: verl_config(load("vision_opd", [f"seed={seed}"])) for seed in (0, 1)}


def prompt_order(tree: DictConfig, epochs: int = 2) -> list[int]:
    """Rows as verl's own sampler draws them from our settings."""
    sampler = create_rl_sampler(tree.data, range(40))
    return [i for _ in range(epochs) for i in sampler]


def check_order_is_a_function_of_the_seed(trees: dict[int, DictConfig]) -> None:
    first = prompt_order(trees[0])
    torch.manual_seed(99)
    torch.rand(7)
    assert prompt_order(trees[0]) == first
    assert prompt_order(trees[1]) != first
    assert sorted(first[:40]) == list(range(40)) and first[:40] != list(range(40))
    assert first[40:] != first[:40]


def test_pitfall_15_the_seed_alone_decides_the_order_of_prompts(trees: dict[int, DictConfig]) -> None:
    check_order_is_a_function_of_the_seed(trees)


@pytest.mark.parametrize("defect", ["no shuffle", "one seed for all"])
def test_pitfall_15_twin_another_source_of_order_is_seen(trees: dict[int, DictConfig], defect: str) -> None:
    changed = {seed: OmegaConf.create(OmegaConf.to_container(tree)) for seed, tree in trees.items()}
    for tree in changed.values():
        if defect == "no shuffle":
            tree.data.shuffle = False
        else:
            tree.data.seed = 5
    with pytest.raises(AssertionError):
        check_order_is_a_function_of_the_seed(changed)


# ---- rows of a step --------------------------------------------------------------------------------------------------


def trainer(ranks: int = 1, updates: int = 1, **vopd: Any) -> Trainer:
    made = Trainer.__new__(Trainer)
    made.resource_pool_manager = SimpleNamespace(get_n_gpus=lambda: ranks)
    made.vopd = OmegaConf.create({"train": {"updates_per_batch": updates, "max_skipped_updates": 3}, **vopd})
    made.config = OmegaConf.create(
        {"actor_rollout_ref": {"rollout": {"n": 2}}, "trainer": {"default_local_dir": "runs/x/checkpoints"}}
    )
    made.global_steps, made.skipped_in_a_row, made.run_dir = 4, 0, Path("runs/x")
    return made


def batch(order: list[int], n: int = 2) -> KVBatchMeta:
    """Rollouts in the order in which they happened to be finished."""
    keys = [f"{i // n:010d}_{i % n}_0" for i in order]
    return KVBatchMeta(keys=keys, tags=[{"seq_len": 10 + i} for i in order], partition_id="train")


@given(st.permutations(range(8)), st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]))
def test_rows_do_not_depend_on_who_finished_first(order: list[int], ranks: int, updates: int) -> None:
    arranged = trainer(ranks, updates)._arrange(batch(order))
    assert arranged.keys == trainer(ranks, updates)._arrange(batch(list(range(8)))).keys


@given(st.permutations(range(8)), st.sampled_from([1, 2, 4]))
def test_a_mini_batch_holds_the_same_rows_for_one_and_two_ranks(order: list[int], updates: int) -> None:
    one = trainer(1, updates)._arrange(batch(order)).keys
    two = trainer(2, updates)._arrange(batch(order)).keys
    size, share = 8 // updates, 4 // updates
    for u in range(updates):
        mine = two[u * share : (u + 1) * share] + two[4 + u * share : 4 + (u + 1) * share]
        assert sorted(mine) == sorted(one[u * size : (u + 1) * size])


def test_rollouts_are_sorted_by_prompt_then_by_number() -> None:
    keys = ["0000000010_2_0", "0000000010_10_0", "0000000009_11_0"]
    assert sorted(keys, key=_sort_key) == ["0000000009_11_0", "0000000010_2_0", "0000000010_10_0"]


def test_a_failed_rollout_stops_the_run_with_a_sentence() -> None:
    assert trainer()._complete(batch([0, 1, 2, 3]), 2)
    with pytest.raises(TrainingError, match="Step 4: 1 of 4 rollouts failed"):
        trainer()._complete(batch([0, 1, 2]), 2)


# ---- what is counted -------------------------------------------------------------------------------------------------


def test_skipped_updates_in_a_row_stop_the_run() -> None:
    made = trainer()
    for skipped in (1.0, 1.0, 0.0, 1.0, 1.0):
        made._guard({"skipped_updates": skipped})
    with pytest.raises(TrainingError, match=r"3 updates in a row had a non-finite gradient.*step 4"):
        made._guard({"skipped_updates": 1.0})


def test_names_of_the_record() -> None:
    given = {
        "update/update_loss": 1.0,
        "update/token/divergence": 2.0,
        "update/seconds/student": 3.0,
        "update/mfu": math.nan,
        "update/grad_norm": math.nan,
        "text": "x",
    }
    line = _renamed(given)
    assert sorted(line) == ["divergence", "grad_norm", "loss", "seconds/student"]
    assert (line["loss"], line["divergence"]) == (1.0, 2.0)
