"""Order of prompts and rows, shares of ranks, and what stops a run."""

from __future__ import annotations

import contextlib
import json
import math
import random
import time
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
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import create_rl_sampler
from verl.trainer.ppo.v1 import replay_buffer

from vopd.backbone import checkpoints, step_rows, stop_requests, verl_internals
from vopd.backbone.evaluations import Evaluations
from vopd.backbone.prompt_stream import PromptStream
from vopd.backbone.replay_buffer import METRIC, GroupBuffer
from vopd.backbone.run_history import History
from vopd.backbone.saving import Saving
from vopd.backbone.step_rows import arrange, row_fields, sort_key, step_rollouts
from vopd.backbone.trainer import Trainer
from vopd.backbone.update_record import renamed
from vopd.backbone.verl_config import verl_config
from vopd.common.failures import ExplainedError, Failure
from vopd.config import load
from vopd.errors import TrainingError, UserError
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


def test_the_seed_alone_decides_the_order_of_prompts(trees: dict[int, DictConfig]) -> None:
    check_order_is_a_function_of_the_seed(trees)


@pytest.mark.parametrize("defect", ["no shuffle", "one seed for all"])
def test_order_twin_another_source_of_order_is_seen(trees: dict[int, DictConfig], defect: str) -> None:
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
    train = {"updates_per_batch": updates, "max_skipped_updates": 3}
    made.vopd = OmegaConf.create({"train": train} | vopd)
    made.config = OmegaConf.create(
        {"actor_rollout_ref": {"rollout": {"n": 2}}, "trainer": {"default_local_dir": "runs/x/checkpoints"}}
    )
    made.global_steps, made.skipped_in_a_row, made.run_dir = 4, 0, Path("runs/x")
    made.saving, made.thrown, made.unwritten = Saving(made.run_dir, made.vopd.train), {}, None
    made.prompts = PromptStream()
    return made


def batch(order: list[int], n: int = 2) -> KVBatchMeta:
    """Rollouts in the order in which they happened to be finished."""
    keys = [f"{i // n:010d}_{i % n}_0" for i in order]
    return KVBatchMeta(keys=keys, tags=[{"seq_len": 10 + i} for i in order], partition_id="train")


@given(st.permutations(range(8)), st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]))
def test_rows_do_not_depend_on_who_finished_first(order: list[int], ranks: int, updates: int) -> None:
    arranged = arrange(batch(order), ranks, updates)
    assert arranged.keys == arrange(batch(list(range(8))), ranks, updates).keys


@given(st.permutations(range(8)), st.sampled_from([1, 2, 4]))
def test_a_mini_batch_holds_the_same_rows_for_one_and_two_ranks(order: list[int], updates: int) -> None:
    one = arrange(batch(order), 1, updates).keys
    two = arrange(batch(order), 2, updates).keys
    size, share = 8 // updates, 4 // updates
    for u in range(updates):
        mine = two[u * share : (u + 1) * share] + two[4 + u * share : 4 + (u + 1) * share]
        assert sorted(mine) == sorted(one[u * size : (u + 1) * size])


def prompts_of_ranks(keys: list[str], ranks: int) -> list[set[str]]:
    share = len(keys) // ranks
    return [{key.split("_")[0] for key in keys[r * share : (r + 1) * share]} for r in range(ranks)]


@given(st.permutations(range(32)), st.sampled_from([1, 2, 4, 8]))
def test_a_rank_gets_whole_prompts(order: list[int], ranks: int) -> None:
    shares = prompts_of_ranks(arrange(batch(order, n=4), ranks, 1).keys, ranks)
    assert [len(share) for share in shares] == [8 // ranks] * ranks


def test_twin_rows_dealt_out_one_by_one_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_rows, "_units", lambda keys, ranks: [[place] for place in range(len(keys))])
    shares = prompts_of_ranks(arrange(batch(list(range(32)), n=4), 4, 1).keys, 4)
    assert [len(share) for share in shares] != [2] * 4


def test_rows_are_dealt_out_one_by_one_where_prompts_cannot_be() -> None:
    arranged = arrange(batch(list(range(12)), n=4), 2, 1)  # three prompts, two ranks
    assert len(arranged.keys) == 12 and len(set(arranged.keys[:6])) == 6


def test_rollouts_are_sorted_by_prompt_then_by_number() -> None:
    keys = ["0000000010_2_0", "0000000010_10_0", "0000000009_11_0"]
    assert sorted(keys, key=sort_key) == ["0000000009_11_0", "0000000010_2_0", "0000000010_10_0"]


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
    line = renamed(given)
    assert sorted(line) == ["divergence", "grad_norm", "loss", "seconds/student"]
    assert (line["loss"], line["divergence"]) == (1.0, 2.0)


# ---- checkpoints and interruptions ---------------------------------------------------------------------------------


class Workers:
    """The trainer's workers: their checkpoint is one file."""

    def __init__(self) -> None:
        self.loaded = ""

    def save_checkpoint(self, folder: str, _remote: None, step: int) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "weights").write_text(f"weights of update {step}")

    def load_checkpoint(self, folder: str) -> None:
        self.loaded = (Path(folder) / "weights").read_text()


class Loader:
    """A data loader whose state is a number."""

    def __init__(self) -> None:
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"yielded": self.place, "generator": torch.tensor([self.place], dtype=torch.uint8)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["generator"].tolist() == [state["yielded"]]
        self.place = state["yielded"]


def at_step(step: int, folder: Path, **train: Any) -> Trainer:
    """A trainer of 8 updates that is in update `step`; every second one is evaluated."""
    settings = {
        "updates_per_batch": 1,
        "max_skipped_updates": 3,
        "save_every": 0,
        "save_minutes": 60,
        "keep": 1,
    }
    made = trainer(train=settings | train, evaluate={"final": [], "during": []})
    made.config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"n": 2}}, "trainer": {"test_freq": 2}})
    made.run_dir, made.global_steps, made.recorded, made.first_line = folder, step, None, None
    made.steps_per_epoch, made.total_training_steps, made.prompts.drawn = 8, 8, 2 * step
    made.history, made.saving = History(folder), Saving(folder, made.vopd.train)
    made.finished, made.resumed_line = None, None
    made.actor_rollout_wg, made.train_dataloader = Workers(), Loader()
    made.replay_buffer = SimpleNamespace(take_thrown=lambda: {"tokens_evicted": 5, "tokens_surplus": 0})
    made.progress = SimpleNamespace(step=lambda *_: None, note=lambda *_: None, evaluation=lambda *_: None)
    made.evaluations = Evaluations(folder, 64, made.history, made.progress, lambda _: [])
    (folder / "config.yaml").write_text("seed: 0")
    return made


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [{"response_tokens": 3, "truncated": False, "correct": i == 0} for i in range(4)]
    monkeypatch.setattr("vopd.backbone.trainer.records_of", lambda *_: found)
    monkeypatch.setattr(verl_internals.PPOTrainerSync, "step", lambda *_: batch([0, 1, 2, 3]))
    answered = {
        "id": "r",
        "family": "f",
        "view": "full",
        "split": "validation",
        "prompt": "p",
        "response": "A",
    }
    answered |= {"response_tokens": 1, "truncated": False, "parsed": "A", "gold": "A", "correct": True}
    monkeypatch.setattr(Evaluations, "_answers", lambda *_: [answered])


class Killed(Exception):  # noqa: N818
    """The process is gone."""


def update(made: Trainer, killed: str = "") -> None:
    """What verl's loop calls in an update; `killed` names where it ends early."""
    metrics: dict[str, Any] = {"update/update_loss": 0.5, "update/token/entropy": 0.4}
    made.train_dataloader.place = made.global_steps
    made.prompts.drawn += 2
    rows = made.step(metrics, {"step": 2.0})
    if killed == "after the update":
        raise Killed
    if made.global_steps % 2 == 0:
        made.on_validate_begin()
        if killed == "before the evaluation":
            raise Killed
        metrics.update(made._validate())
        if killed == "after the evaluation":
            raise Killed
    made._compute_metrics(rows, metrics, {"step": 2.0}, made.global_steps, 0)
    made.global_steps += 1


def resumed(folder: Path, **train: Any) -> Trainer:
    """A new process on the folder, as far as its first update."""
    made = at_step(0, folder, **train)
    made._load_checkpoint()
    if made.global_steps:
        made._validate()
    made.global_steps += 1
    return made


def steps(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def without_seconds(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith("seconds/")} for line in lines]


@pytest.mark.parametrize("killed", ["after the update", "before the evaluation", "after the evaluation"])
@pytest.mark.parametrize("at", [3, 4])
@pytest.mark.parametrize("save_every", [0, 1, 3])
@pytest.mark.usefixtures("rows")
def test_a_run_that_is_killed_anywhere_has_the_history_of_one_that_is_not(
    tmp_path: Path, killed: str, at: int, save_every: int
) -> None:
    (tmp_path / "whole").mkdir(), (tmp_path / "killed").mkdir()
    whole = at_step(1, tmp_path / "whole", save_every=save_every)
    for _ in range(6):
        update(whole)
    made = at_step(1, tmp_path / "killed", save_every=save_every)
    with contextlib.suppress(Killed):
        for step in range(1, 7):
            update(made, killed if step == at else "")
    again = resumed(tmp_path / "killed", save_every=save_every)
    assert again.train_dataloader.place == again.global_steps - 1
    while again.global_steps < 7:
        update(again)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        first, second = (
            [json.loads(line) for line in (tmp_path / place / name).read_text().splitlines()]
            for place in ("whole", "killed")
        )
        for line in (*first, *second):
            line.pop("seconds", None)
        assert without_seconds(first) == without_seconds(second)
    assert again.prompts.drawn == whole.prompts.drawn


@pytest.mark.usefixtures("rows")
def test_a_stop_in_the_middle_of_an_update_keeps_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = at_step(1, tmp_path)

    def stopped(self: Trainer, _: Any) -> None:
        update(made)
        made.train_dataloader.place, made.prompts.drawn = 99, 99  # the next prompts are drawn already
        raise stop_requests.Stopped

    monkeypatch.setattr(verl_internals.PPOTrainerSync, "fit", stopped)
    with pytest.raises(stop_requests.Stopped):
        made.fit(None)
    again = resumed(tmp_path)
    assert (again.global_steps, again.train_dataloader.place, again.prompts.drawn) == (2, 1, 4)
    assert again.actor_rollout_wg.loaded == "weights of update 1"


@pytest.mark.usefixtures("rows")
def test_checkpoints_are_made_by_count_by_time_and_after_the_last_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = at_step(1, tmp_path, save_every=3, save_minutes=1, keep=9)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    made.config.trainer.test_freq = 100
    written: dict[int, list[int]] = {}
    for passed in (0, 0, 0, 0, 61, 0, 0, 0):
        now += passed
        step = made.global_steps
        metrics: dict[str, Any] = {"update/update_loss": 0.5, "update/token/entropy": 0.4}
        made._compute_metrics(made.step(metrics, {"step": 2.0}), metrics, {"step": 2.0}, step, 0)
        written[step] = [c.step for c in checkpoints.found(made.saving.folder)][::-1]
        made.global_steps += 1
    assert written[2] == [] and written[3] == [3] and written[4] == [3]
    assert written[5] == [3, 5] and written[8] == [3, 5, 6, 8]
    made.saving.save_seconds = 30.0  # slow saves: at most a tenth of the time
    now += 61
    made.global_steps, made.total_training_steps = 10, 100
    assert not made.saving.due(made.global_steps, made.total_training_steps)
    now += 300
    assert made.saving.due(made.global_steps, made.total_training_steps)


@pytest.mark.usefixtures("rows")
def test_a_full_disk_ends_in_a_sentence_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = at_step(1, tmp_path, save_every=1)
    update(made)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Workers, "save_checkpoint", full)
    with pytest.raises(TrainingError, match=r"update 2 could not be written.*No space left.*update 1\. Make"):
        update(made)
    assert [path.name for path in made.saving.folder.iterdir()] == ["global_step_1"]
    monkeypatch.undo()


@pytest.mark.parametrize("drawn", range(1, 9))
def test_the_prompt_stream_continues_after_a_resume_also_over_epochs(drawn: int) -> None:
    """12 rows in batches of 4: three draws an epoch."""

    def loader() -> Trainer:
        generator = torch.Generator().manual_seed(5)
        data = [{"row": {"id": i}} for i in range(12)]
        made = trainer(data={})
        made.train_dataloader = StatefulDataLoader(
            data, batch_size=4, num_workers=0, drop_last=True, sampler=RandomSampler(data, generator=generator),
            collate_fn=lambda rows: {"row": [row["row"] for row in rows]},
        )  # fmt: skip
        return made

    def draws(made: Trainer, count: int) -> list[list[int]]:
        return [[row["id"] for row in made.prompts.draw(made.train_dataloader, 4)] for _ in range(count)]

    through = loader()
    draws(through, drawn)
    state, after = through.train_dataloader.state_dict(), loader()
    after.train_dataloader.load_state_dict(state)
    assert draws(after, 6) == draws(through, 6)


# ---- groups that are discarded -------------------------------------------------------------------------------------


def test_more_refills_than_allowed_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer()
    made.vopd.train.update({"prompts": 8, "max_refills": 2})
    made.refilled, submitted = 0, []
    monkeypatch.setattr(
        verl_internals.PPOTrainerSync, "_add_prompts_to_generate", lambda self, n: submitted.append(n) or n
    )
    for _ in range(2):
        made._add_prompts_to_generate(8)
    with pytest.raises(
        TrainingError, match=r"Step 4: 17 more prompts.*2 answers are all correct or all incorrect"
    ):
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


def buffer_for(queue: Queue, kind: type[verl_internals.ReplayBuffer], prompts: int) -> Any:
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
    monkeypatch: pytest.MonkeyPatch,
    kind: type[verl_internals.ReplayBuffer],
    pace: Callable[[list[str]], list[str]],
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
    assert len({str(outcome(monkeypatch, verl_internals.ReplayBuffer, pace)) for pace in paces}) > 1


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
    def filtered(recipe: str, *overrides: str) -> bool:
        return bool(verl_config(load(recipe, list(overrides))).algorithm.filter_groups.enable)

    assert [filtered(r) for r in ("vision_opd", "grpo", "dapo")] == [False, False, True]
    assert not filtered("dapo", "rollout.replay=somewhere")


# ---- evaluation in between -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "frequency"), [("20", 20), ("0", 33)])
def test_without_evaluations_in_between_the_last_one_is_still_made(every: str, frequency: int) -> None:
    """verl evaluates after the last step only if it evaluates at all."""
    tree = verl_config(load("vision_opd", ["train.steps=33", f"evaluate.every={every}"]))
    assert tree.trainer.test_freq == frequency


# ---- rollout workers that fail or are gone -----------------------------------------------------------------------


class RolloutWorkers:
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
    workers = RolloutWorkers(monkeypatch)
    workers.trainer._look_at_workers(False)
    workers.gone = True
    workers.trainer.looked_at_workers = 0.0
    with pytest.raises(ConnectionError):
        workers.trainer._look_at_workers(False)


def test_why_a_rollout_failed_is_raised_while_the_others_are_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = RolloutWorkers(monkeypatch)
    workers.found = [
        Failure("Row 7: not readable.", 2, "UserError", "", "rollout worker (pid 3)"),
        Failure("later"),
    ]
    queue = Queue(monkeypatch, [], lambda under_way: [])
    buffer = buffer_for(queue, GroupBuffer, 1)
    buffer.on_poll = workers.trainer._look_at_workers
    for others in ("running", "failure"):  # all at once, too, where a server was killed
        for uid, status in (("0", "failure"), ("1", others)):
            queue.items[uid] = {"is_prompt": True, "status": status, "global_steps": 3}
        with pytest.raises(ExplainedError) as raised:
            buffer.sample(global_steps=3, partition_id="train", batch_size=2)
        assert raised.value.failure == workers.found[0]
    workers.found = []
    with pytest.raises(ExplainedError, match="no worker says why"):
        workers.trainer._look_at_workers(True)
