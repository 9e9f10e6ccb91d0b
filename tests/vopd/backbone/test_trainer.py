"""Order of prompts and rows, shares of ranks, and what stops a run."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
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
from verl.trainer.ppo.v1 import replay_buffer

from vopd.backbone import seams
from vopd.backbone.groups import METRIC, GroupBuffer
from vopd.backbone.trainer import Trainer, TrainingError, _renamed, _sort_key, row_fields, step_rollouts
from vopd.backbone.verl_config import verl_config
from vopd.config import load
from vopd.errors import UserError
from vopd.failures import ExplainedError, Failure
from vopd.method import Method

# ---- prompts


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


# ---- rows of a step ------------------------------------------------------------------------------------------------


def trainer(ranks: int = 1, updates: int = 1, **vopd: Any) -> Trainer:
    made = Trainer.__new__(Trainer)
    made.resource_pool_manager = SimpleNamespace(get_n_gpus=lambda: ranks)
    made.vopd = OmegaConf.create({"train": {"updates_per_batch": updates, "max_skipped_updates": 3}, **vopd})
    made.config = OmegaConf.create(
        {"actor_rollout_ref": {"rollout": {"n": 2}}, "trainer": {"default_local_dir": "runs/x/checkpoints"}}
    )
    made.global_steps, made.skipped_in_a_row, made.run_dir = 4, 0, Path("runs/x")
    made.thrown, made.unwritten = {}, None
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


# ---- what is counted -----------------------------------------------------------------------------------------------


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


# ---- an interrupted evaluation -------------------------------------------------------------------------------------


def at_step_4(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A trainer whose fourth update was just made."""
    made = trainer()
    made.run_dir, made.recorded, made.first_line, made.steps_per_epoch = folder, None, None, 8
    made.total_training_steps = 4
    made.replay_buffer = SimpleNamespace(take_thrown=lambda: {"tokens_evicted": 5, "tokens_surplus": 0})
    made.progress = SimpleNamespace(step=lambda *_: None)
    rows = [{"response_tokens": 3, "truncated": False, "correct": i == 0} for i in range(4)]
    monkeypatch.setattr(Trainer, "_records", lambda *_: rows)
    monkeypatch.setattr(seams.PPOTrainerSync, "step", lambda *_: batch([0, 1, 2, 3]))
    monkeypatch.setattr(seams.PPOTrainerSync, "_load_checkpoint", lambda _: None)
    (folder / "metrics.jsonl").write_text('{"step": 3}\n')
    return made


def made_and_evaluated(made: Trainer, seconds: dict[str, float], whole: bool) -> None:
    """What verl's loop calls after an update that an evaluation follows; not `whole`: interrupted in that one."""
    metrics: dict[str, Any] = {"update/update_loss": 0.5, "update/token/entropy": 0.4}
    rows = made.step(metrics, seconds)
    made.on_validate_begin()
    if whole:
        made._compute_metrics(rows, metrics, {**seconds, "testing": 9.0}, made.global_steps, 0)


def steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_update_before_an_interrupted_evaluation_keeps_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_and_evaluated(at_step_4(tmp_path, monkeypatch), {"step": 2.0}, whole=False)
    assert [line["step"] for line in steps(tmp_path)] == [3]
    again = trainer()
    again.run_dir = tmp_path
    again._load_checkpoint()
    assert [line["step"] for line in steps(tmp_path)] == [3, 4]
    kept = steps(tmp_path)[1]
    assert (kept["tokens_generated"], kept["loss"], kept["seconds/step"]) == (17, 0.5, 2.0)
    again._load_checkpoint()
    assert [line["step"] for line in steps(tmp_path)] == [3, 4]


def test_an_evaluation_that_ends_leaves_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = at_step_4(tmp_path, monkeypatch)
    made_and_evaluated(made, {"step": 2.0}, whole=True)
    made._load_checkpoint()
    assert [line["step"] for line in steps(tmp_path)] == [3, 4]
    assert steps(tmp_path)[1]["seconds/testing"] == 9.0


def test_a_line_of_an_update_that_is_made_again_and_a_torn_one_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_and_evaluated(at_step_4(tmp_path, monkeypatch), {"step": 2.0}, whole=False)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    again = trainer()
    again.run_dir, again.global_steps = tmp_path, 3
    again._load_checkpoint()
    assert steps(tmp_path) == [{"step": 3}]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


# ---- groups that are thrown away -----------------------------------------------------------------------------------


def test_more_refills_than_allowed_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer()
    made.vopd.train.update({"prompts": 8, "max_refills": 2})
    made.refilled, submitted = 0, []
    monkeypatch.setattr(
        seams.PPOTrainerSync, "_add_prompts_to_generate", lambda self, n: submitted.append(n) or n
    )
    for _ in range(2):
        made._add_prompts_to_generate(8)
    with pytest.raises(TrainingError, match=r"Step 4: 17 more prompts.*2 answers are all right or all wrong"):
        made._add_prompts_to_generate(1)
    assert submitted == [8, 8]


class Queue:
    """TransferQueue as the buffer sees it: prompts with a status, rollouts with a verdict and a length.

    Prompts finish between two looks of the buffer, some of them at a time, as `pace` says.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        groups: list[list[float]],
        pace: Callable[[list[str]], list[str]],
    ) -> None:
        self.items: dict[str, dict[str, Any]] = {}
        self.verdicts: dict[str, float] = {}
        self.stream, self.pace = iter(enumerate(groups)), pace
        self.under_way: dict[str, list[float]] = {}
        self.refills: list[int] = []
        monkeypatch.setattr(replay_buffer.tq, "kv_list", self.look)
        monkeypatch.setattr(replay_buffer.tq, "kv_clear", self.clear)
        monkeypatch.setattr(replay_buffer.tq, "kv_batch_get", self.get)

    def look(self, *_: Any) -> dict[str, Any]:
        for uid in self.pace(sorted(self.under_way)):
            self.finish(uid, self.under_way.pop(uid))
        return {"train": dict(self.items)}

    def clear(self, partition_id: str, keys: list[str]) -> None:
        for key in keys:
            self.items.pop(key, None)

    def get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> dict[str, Any]:
        assert select_fields == ["extra_fields"]
        return {"extra_fields": [{"reward_extra_info": {METRIC: self.verdicts[key]}} for key in keys]}

    def ask(self, count: int) -> int:
        for _ in range(count):
            place, verdicts = next(self.stream)
            uid = f"{place:010d}"
            self.items[uid] = {"is_prompt": True, "status": "running", "global_steps": 1}
            self.under_way[uid] = verdicts
        return count

    def refill(self, count: int) -> int:
        self.refills.append(count)
        return self.ask(count)

    def finish(self, uid: str, verdicts: list[float]) -> None:
        self.items[uid]["status"] = "finished"
        for i, verdict in enumerate(verdicts):
            key = f"{uid}_{i}_0"
            self.items[key] = {"status": "success", "response_len": 10 + i}
            self.verdicts[key] = verdict


def buffer_for(queue: Queue, kind: type[seams.ReplayBuffer], prompts: int) -> Any:
    return kind(
        trainer_mode="sync",
        trainer_config=OmegaConf.create({}),
        max_off_policy_threshold=None,
        max_off_policy_strategy="drop",
        sampler_kwargs=OmegaConf.create({}),
        poll_interval=0.0,
        refill_fn=queue.refill,
        filter_groups_metric=METRIC,
        train_batch_size=prompts,
        gen_batch_size=1,
    )


def taken(buffer: Any, prompts: int) -> list[str]:
    done, _ = buffer.sample(global_steps=1, partition_id="train", batch_size=prompts)
    return sorted({key.split("_")[0] for key in done.keys})


def test_groups_alike_are_evicted_replaced_and_counted_and_the_streams_first_ones_win(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = [[1, 1], [0, 0], [1, 0], [0, 0], [0, 1], [1, 0], [1, 0], [1, 0], [0, 1], [1, 0]]
    queue = Queue(monkeypatch, groups, lambda under_way: under_way)
    queue.ask(2)
    buffer = buffer_for(queue, GroupBuffer, 2)
    # 0 and 1 are alike, 3 too; 2 and the next mixed one of the stream win.
    assert taken(buffer, 2) == ["0000000002", "0000000004"]
    assert sum(queue.refills) >= 3
    thrown = buffer.take_thrown()
    assert thrown["prompts_evicted"] == 3 and thrown["rollouts_evicted"] == 6
    assert thrown["tokens_evicted"] == 3 * 21
    assert thrown["prompts_surplus"] == sum(queue.refills) - 3
    assert thrown["tokens_surplus"] == 21 * thrown["prompts_surplus"]
    assert set(buffer.take_thrown().values()) == {0}


def one_by_one(rng: random.Random) -> Callable[[list[str]], list[str]]:
    """None, one or several of those under way finish, whichever it may be."""
    return lambda under_way: rng.sample(under_way, rng.randint(0, len(under_way)))


STREAM = [
    [float(c) for c in group] for group in ("11", "10", "00", "10", "00", "01", "11", "10", "00", "01")
] * 6


def outcome(
    monkeypatch: pytest.MonkeyPatch, kind: type[seams.ReplayBuffer], pace: Callable[[list[str]], list[str]]
) -> Any:
    queue = Queue(monkeypatch, STREAM, pace)
    queue.ask(4)
    buffer = buffer_for(queue, kind, 4)
    return taken(buffer, 4), queue.refills, sorted(queue.verdicts)


def test_what_a_filtered_step_takes_and_draws_does_not_depend_on_what_finishes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_once = outcome(monkeypatch, GroupBuffer, lambda under_way: under_way)
    for seed in range(50):
        assert outcome(monkeypatch, GroupBuffer, one_by_one(random.Random(seed))) == at_once


def test_twin_verls_own_buffer_depends_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    paces = [one_by_one(random.Random(seed)) for seed in range(50)]
    assert len({str(outcome(monkeypatch, seams.ReplayBuffer, pace)) for pace in paces}) > 1


# ---- what prepare may say ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepares(Method):
    """Returns what it is told to."""

    prepared: dict[str, torch.Tensor] = field(default_factory=dict)

    def prepare(self, rollouts: Any) -> dict[str, torch.Tensor]:
        return self.prepared


def rollouts() -> Any:
    records = [{"correct": c, "truncated": False, "response_tokens": n} for c, n in ((True, 2), (False, 3))]
    return step_rollouts(["0000000007_0_0", "0000000007_1_0"], records, 8)


def test_advantages_of_rows_become_those_of_their_tokens() -> None:
    prepared = {"advantages": torch.tensor([0.5, -2.0])}
    fields = row_fields(Prepares(outputs=("x",), prepared=prepared), rollouts())
    assert [row.tolist() for row in fields["advantages"].unbind()] == [[0.5] * 2, [-2.0] * 3]


@pytest.mark.parametrize(
    ("advantage", "prepared", "sentence"),
    [
        (None, {"wieghts": torch.ones(2)}, "'wieghts'; it may return weights, kept, advantages"),
        (None, {"weights": torch.ones(3)}, r"shape \(3,\)"),
        (None, {"kept": torch.ones(2)}, "kept is bool"),
        (None, {"weights": torch.tensor([1.0, math.nan])}, "not finite"),
        ("grpo", {"advantages": torch.ones(2)}, "drop one"),
    ],
)
def test_what_is_no_contract_value_is_refused(advantage: Any, prepared: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        row_fields(Prepares(outputs=("x",), advantage=advantage, prepared=prepared), rollouts())


def test_groups_are_filtered_where_the_method_says_so_but_never_in_a_replay() -> None:
    def filtered(recipe: str, *words: str) -> bool:
        return bool(verl_config(load(recipe, list(words))).algorithm.filter_groups.enable)

    assert [filtered(r) for r in ("vision_opd", "grpo", "dapo")] == [False, False, True]
    assert not filtered("dapo", "rollout.replay=somewhere")


# ---- evaluation in between -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "frequency"), [("20", 20), ("0", 33)])
def test_without_evaluations_in_between_the_last_one_is_still_made(every: str, frequency: int) -> None:
    """verl evaluates after the last step only if it evaluates at all."""
    tree = verl_config(load("vision_opd", ["train.steps=33", f"evaluate.every={every}"]))
    assert tree.trainer.test_freq == frequency


# ---- rollout workers that fail or are gone -----------------------------------------------------------------------


class Workers:
    """Ray and a rollout worker: its failures, and whether it is gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[Failure] = []
        self.gone = False
        calls = {name: SimpleNamespace(remote=lambda name=name: name) for name in ("until_death", "failures")}
        self.trainer = Trainer.__new__(Trainer)
        self.trainer.rollout_workers = [SimpleNamespace(**calls)]
        self.trainer.until_death, self.trainer.looked_at_workers, self.trainer.global_steps = [], 0.0, 3
        monkeypatch.setattr("vopd.backbone.trainer.ray", SimpleNamespace(wait=self.wait, get=self.get))

    def wait(self, calls: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        assert (calls, num_returns, timeout) == (["until_death"], 1, 0)
        return (calls, []) if self.gone else ([], calls)

    def get(self, calls: list[str], timeout: float | None = None) -> list[Any]:
        if "until_death" in calls:
            raise ConnectionError("the actor died")
        return [self.found for _ in calls]


def test_a_rollout_worker_that_is_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(monkeypatch)
    workers.trainer._look_at_workers(False)
    workers.gone = True
    workers.trainer.looked_at_workers = 0.0
    with pytest.raises(ConnectionError):
        workers.trainer._look_at_workers(False)


def test_why_a_rollout_failed_is_raised_while_the_others_are_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = Workers(monkeypatch)
    workers.found = [
        Failure("Row 7: not readable.", 2, "UserError", "", "rollout worker (pid 3)"),
        Failure("later"),
    ]
    queue = Queue(monkeypatch, [], lambda under_way: [])
    buffer = buffer_for(queue, GroupBuffer, 1)
    buffer.on_poll = workers.trainer._look_at_workers
    for uid, status in (("0", "failure"), ("1", "running")):
        queue.items[uid] = {"is_prompt": True, "status": status, "global_steps": 3}
    with pytest.raises(ExplainedError) as raised:
        buffer.sample(global_steps=3, partition_id="train", batch_size=2)
    assert raised.value.failure == workers.found[0]
    workers.found = []
    with pytest.raises(ExplainedError, match="no worker says why"):
        workers.trainer._look_at_workers(True)
