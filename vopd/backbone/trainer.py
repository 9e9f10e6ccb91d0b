"""The training loop: verl's synchronous V1 trainer, told to run a method and to keep an honest record.

One step: n rollouts per prompt -> rows in canonical order -> rewards, and advantages, weights, kept rows where the
method has them -> update (old log-probs, scorers, student, teachers; inside the worker) -> weight sync. Evaluation goes
through the same rollout. Rollouts can be stored and trained on later, by this run or another (`recording`).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
import transfer_queue as tq
from safetensors import SafetensorError
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils.debug import marked_timer
from verl.utils.metric import reduce_metrics

from vopd import method as contract
from vopd.backbone import checkpoints, recorded_rollouts, stop_requests, verl_internals
from vopd.backbone.dataset import TripletDataset
from vopd.backbone.policy_gradient import advantages
from vopd.backbone.progress import Progress
from vopd.backbone.replay_buffer import GroupBuffer
from vopd.backbone.rollout import early_workers, training_limit
from vopd.backbone.rollout_servers import ServerManager
from vopd.backbone.run_history import History
from vopd.backbone.tracking import Trackers
from vopd.backbone.worker import MethodWorker
from vopd.common.collapse import collapse_flags
from vopd.common.failures import ExplainedError, Failure, explain
from vopd.errors import UserError
from vopd.evaluation.records import read_records, write_records
from vopd.method import Method, Rollouts, calling
from vopd.method_checks import checked, checked_rewards

NAME = "vopd"
STATE, DATA, ACTOR = "trainer.json", "data.pt", "actor"  # in a checkpoint, beside the run's config.yaml
SAVING_SHARE = 0.1  # of the time at most goes to checkpoints that are made because of the time
LOOK_SECONDS = 5.0
POLL_SECONDS = 0.02  # verl waits 2 s between looks at the queue: most of a step on a small model
UPDATE_FIELDS = ("input_ids", "responses", "response_mask", "loss_mask", "rollout_log_probs", "rendered")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is kept."""


@verl_internals.register_trainer(NAME)
class Trainer(verl_internals.PPOTrainerSync):
    """See the module's docstring."""

    def __init__(self, config: Any) -> None:
        self.vopd = config.vopd
        self.run_dir = Path(self.vopd.run_dir)
        self.method = contract.of(self.vopd)
        self.progress = Progress(self.run_dir)
        self.prompts_drawn = 0
        self.refilled = 0
        self.skipped_in_a_row = 0
        self.first_line: dict[str, Any] | None = None
        self.thrown: dict[str, int] = {}
        self.unwritten: Callable[[], dict[str, Any]] | None = None
        self.history = History(self.run_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        self.saved_at, self.save_seconds = time.monotonic(), 0.0
        self.finished: Finished | None = None
        self.resumed_line: dict[str, Any] | None = None
        self.train_dataloader_it: Any = None
        self.until_death: list[Any] = []
        self.looked_at_workers = 0.0
        self.recorded = self._recorded()
        verl_internals.use_server_manager(ServerManager)
        verl_internals.use_replay_buffer(GroupBuffer)
        verl_internals.use_tracking(partial(Trackers, verl_internals.Tracking, self.progress.note))
        super().__init__(config)
        # The training process is about to import and load for a while: load what comes next meanwhile.
        threading.Thread(
            target=importlib.import_module, args=(verl_internals.ROLLOUT_SERVER_MODULE,), daemon=True
        ).start()
        self.progress.note("loading the model into the trainer")

    # ---- construction -------------------------------------------------------------------------------------------

    def _build_replay_buffer(self) -> Any:
        self.trainer_mode = "sync"  # verl takes every other name for an asynchronous trainer
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = POLL_SECONDS
        buffer.on_poll = self._look_at_workers
        return buffer

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        self.role_worker_mapping[verl_internals.Role.ActorRollout] = ray.remote(MethodWorker)
        self.rollout_workers = early_workers(self.config)

    def _look_at_workers(self, failed: bool) -> None:
        """While rollouts are waited for: raise what made one fail, or that a rollout worker is gone."""
        now = time.monotonic()
        if not failed and now - self.looked_at_workers < LOOK_SECONDS:
            return
        self.looked_at_workers = now
        if not self.until_death:
            self.until_death = [worker.until_death.remote() for worker in self.rollout_workers]
        gone, _ = ray.wait(self.until_death, num_returns=len(self.until_death), timeout=0)
        ray.get(gone)
        if failed:
            found = ray.get(
                [worker.failures.remote() for worker in self.rollout_workers], timeout=LOOK_SECONDS
            )
            unknown = Failure(f"Step {self.global_steps}: a rollout failed, and no worker says why.")
            raise ExplainedError(next((first for failures in found for first in failures), unknown))

    # ---- prompts ------------------------------------------------------------------------------------------------

    def _recorded(self) -> Path | None:
        """Folder of the rollouts to train on, or None: they are generated step by step."""
        if self.vopd.rollout.replay:
            return Path(self.vopd.rollout.replay)
        return self.run_dir / "rollouts" if self.method.rollout.weights == "initial" else None

    def _next_train_batch(self, num_prompts: int | None = None) -> Any:
        views = ",".join(self.method.views)
        if self.recorded is None:
            rows = self._draw(num_prompts or self.vopd.train.prompts)
            batch = self._requests(rows, [views] * len(rows))
        else:
            groups, self.recorded_seconds = recorded_rollouts.read(self.recorded, self.global_steps)
            rows = [self._row(group.row_id) for group in groups]
            batch = self._requests(rows, [views] * len(rows), groups)
        verl_internals.assign_non_tensor(batch, global_steps=self.global_steps)
        return batch

    def _draw(self, count: int) -> list[dict[str, Any]]:
        """The next rows of the prompt stream; `count` is a multiple of the loader's batch."""
        rows: list[dict[str, Any]] = []
        while len(rows) < count:
            if self.train_dataloader_it is None:
                self.train_dataloader_it = iter(self.train_dataloader)
            drawn = next(self.train_dataloader_it, None)
            if drawn is None:
                self.train_dataloader_it = iter(self.train_dataloader)
                drawn = next(self.train_dataloader_it, None)
            if drawn is None:
                raise UserError(
                    f"train.prompts={count}: the training file has fewer rows; take fewer prompts."
                )
            rows.extend(drawn["row"])
        return rows

    def _row(self, row_id: str) -> dict[str, Any]:
        if not hasattr(self, "_places"):
            self._places = {name: place for place, name in enumerate(self.train_dataset.rows["id"])}
        if row_id not in self._places:
            raise UserError(f"{self.recorded}: row {row_id} is not in the training data; take the same data.")
        return self.train_dataset.row(self._places[row_id])

    def _add_prompts_to_generate(self, num_prompts: int) -> int:
        """verl asks for prompts in place of filtered groups; it would do so for ever."""
        self.refilled += num_prompts
        if self.refilled > self.vopd.train.max_refills * self.vopd.train.prompts:
            raise TrainingError(
                f"Step {self.global_steps}: {self.refilled} more prompts would be needed to replace groups whose "
                f"{self.config.actor_rollout_ref.rollout.n} answers are all right or all wrong; the policy is nearly "
                "always right, or nearly always wrong, on this data. Raise train.max_refills or train.rollouts, or "
                "take other data."
            )
        return super()._add_prompts_to_generate(num_prompts)

    def _requests(
        self,
        rows: list[dict[str, Any]],
        views: list[str],
        groups: list[recorded_rollouts.Group] | None = None,
    ) -> Any:
        """Rows as verl's prompt batch. Keys count upwards, so that sorting them is sorting the prompt stream.

        views: per row, the views to render, joined by commas; the first one generates.
        groups: responses to take instead of generating.
        """
        recorded = {"recorded": [{"tokens": g.tokens, "log_probs": g.log_probs} for g in groups or []]}
        uids = [f"{self.prompts_drawn + i:010d}" for i in range(len(rows))]
        self.prompts_drawn += len(rows)
        return verl_internals.get_tensordict(
            {
                "row": rows,
                "views": views,
                "uid": uids,
                "index": list(range(len(rows))),
                "dummy_tensor": torch.zeros(len(rows), 1, dtype=torch.uint8),
                **(recorded if groups else {}),
            }
        )

    def _generate_ahead(self) -> None:
        """All rollouts of the run from the weights as they are, one file a step; whole files are kept."""
        folder, steps = self.run_dir / "rollouts", self.total_training_steps
        if all(recorded_rollouts.path(folder, step).exists() for step in range(1, steps + 1)):
            return
        if self.global_steps:
            raise TrainingError(f"{folder} lacks rollouts of the initial weights; remove {self.run_dir}.")
        for step in range(1, steps + 1):
            rows = self._draw(self.vopd.train.prompts)
            if not recorded_rollouts.path(folder, step).exists():
                start = time.perf_counter()
                batch = self._requests(rows, [self.method.rollout.view] * len(rows))
                verl_internals.assign_non_tensor(batch, global_steps=step)
                self._submit_batch_to_rollout(batch)
                done, _ = self.replay_buffer.sample(
                    global_steps=step, partition_id="train", batch_size=len(rows)
                )
                self._store(self._complete(done, len(rows)), folder, step, time.perf_counter() - start)
                tq.kv_clear(keys=done.keys, partition_id="train")
            self.progress.generation(step, steps)

    def _store(self, batch: KVBatchMeta, folder: Path, step: int, seconds: float) -> None:
        """Write a step's rollouts in canonical order."""
        keys = sorted(batch.keys, key=_sort_key)
        fields = ["record", "responses", "rollout_log_probs"]
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=fields)
        groups: list[recorded_rollouts.Group] = []
        columns = (data["record"], data["responses"].unbind(), data["rollout_log_probs"].unbind())
        for key, record, tokens_R, log_probs_R in zip(keys, *columns, strict=True):
            if _sort_key(key)[1] == 0:
                groups.append(recorded_rollouts.Group(verl_internals.plain(record)["id"], [], []))
            groups[-1].tokens.append(tokens_R.tolist())
            groups[-1].log_probs.append(log_probs_R.tolist())
        recorded_rollouts.write(folder, step, groups, seconds)

    # ---- one step -----------------------------------------------------------------------------------------------

    def _step_once(
        self, metrics: dict[str, Any], timing_raw: dict[str, float], sample_batch_size: int
    ) -> KVBatchMeta:
        self.refilled = 0
        with marked_timer("gen", timing_raw):
            batch, _ = self.replay_buffer.sample(
                global_steps=self.global_steps, partition_id="train", batch_size=sample_batch_size
            )
            self.on_sample_end()
        batch = self._arrange(self._complete(batch, sample_batch_size))
        batch.extra_info["temperature"] = 1.0
        if self.vopd.rollout.record:
            self._store(batch, self.run_dir / "rollouts", self.global_steps, timing_raw["gen"])
        with marked_timer("prepare", timing_raw):
            prepared = self._prepare(batch, metrics)
        stop_requests.check()  # from here on the weights are under way to those of the next update
        with marked_timer("update_actor", timing_raw):
            self._update_actor(batch, metrics, prepared)
        return batch

    def _prepare(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> list[str]:
        """Rewards, and what the method makes of the whole step; names of the fields that the rows were given."""
        keys = sorted(batch.keys, key=_sort_key)
        records = self._records(keys, batch.partition_id)
        rollouts = step_rollouts(keys, records, training_limit(self.vopd))
        with calling(self.method, "rewards"):
            rewards_B = checked_rewards(self.method.rewards(rollouts), len(keys))
        rollouts = dataclasses.replace(rollouts, rewards_B=rewards_B)
        fields = row_fields(self.method, rollouts)
        groups = self.config.actor_rollout_ref.rollout.n
        share_G = rollouts.correct_B.view(-1, groups).float().mean(-1)
        metrics["reward"] = rewards_B.mean().item()
        metrics["mixed_groups"] = ((share_G > 0) & (share_G < 1)).float().mean().item()
        if fields:
            tq.kv_batch_put(
                keys=keys, partition_id=batch.partition_id, fields=TensorDict(fields, [len(keys)])
            )
        return list(fields)

    def _records(self, keys: list[str], partition_id: str) -> list[dict[str, Any]]:
        data = tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=["record"])
        return [dict(verl_internals.plain(record)) for record in data["record"]]

    def _complete(self, batch: KVBatchMeta, prompts: int) -> KVBatchMeta:
        """All rollouts of all prompts, or a sentence: verl would fill the place of a failed group with padding."""
        expected = prompts * self.config.actor_rollout_ref.rollout.n
        if len(batch) != expected:
            raise TrainingError(
                f"Step {self.global_steps}: {expected - len(batch)} of {expected} rollouts failed; the cause is in "
                f"{self.run_dir / 'log.txt'}."
            )
        return batch

    def _arrange(self, batch: KVBatchMeta) -> KVBatchMeta:
        """Canonical order (prompt stream, rollout index), then equal shares per rank inside each mini-batch.

        A mini-batch holds the same rows for every number of ranks; within it, ranks get balanced token counts.
        """
        ranks = self.resource_pool_manager.get_n_gpus()
        order = sorted(range(len(batch)), key=lambda i: _sort_key(batch.keys[i]))
        size = len(batch) // self.vopd.train.updates_per_batch
        shares: dict[int, list[int]] = defaultdict(list)
        for start in range(0, len(batch), size):
            mini = order[start : start + size]
            lengths = [batch.tags[i]["seq_len"] for i in mini]
            parts = verl_internals.get_seqlen_balanced_partitions(
                lengths, k_partitions=ranks, equal_size=True
            )
            for rank, part in enumerate(parts):
                shares[rank].extend(mini[j] for j in sorted(part))
        batch.reorder([i for rank in range(ranks) for i in shares[rank]])
        return batch

    def _update_actor(
        self, batch: KVBatchMeta, metrics: dict[str, Any], prepared: list[str] | None = None
    ) -> KVBatchMeta:
        updates = self.vopd.train.updates_per_batch
        rows = len(batch) // updates
        batch.fields = [*UPDATE_FIELDS, *(prepared or [])]
        batch.extra_info.update(
            global_batch_size=rows,
            mini_batch_size=rows,
            epochs=1,
            seed=self.vopd.seed,
            dataloader_kwargs={"shuffle": False},
        )
        output = self.actor_rollout_wg.update_actor(batch)
        update = reduce_metrics(dict(output["metrics"]))
        for name in ("scorer_tokens", "update_rows"):
            update[name] *= updates  # a sum over the batch, not a mean over its updates
        update["updates"] = round(updates * (1 - update["skipped_updates"] - update["empty_updates"]))
        metrics.update({f"update/{k}": v for k, v in update.items()})
        self._guard(update)
        return batch

    def _guard(self, update: dict[str, Any]) -> None:
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if update["skipped_updates"] > 0 else 0
        if self.skipped_in_a_row >= self.vopd.train.max_skipped_updates:
            raise TrainingError(
                f"{self.skipped_in_a_row} updates in a row had a non-finite gradient and were skipped; stopped at "
                f"step {self.global_steps}. The last checkpoint is in {self.checkpoints}."
            )

    # ---- the record ---------------------------------------------------------------------------------------------

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> KVBatchMeta:
        batch = super().step(metrics, timing_raw)
        self.thrown = self.replay_buffer.take_thrown()
        self.unwritten = partial(self._line, batch, metrics, timing_raw)
        return batch

    def on_validate_begin(self) -> None:
        """An evaluation takes minutes: the update before it is kept first, with its line."""
        super().on_validate_begin()
        if self.unwritten:
            self._finish_update(self.unwritten())
            self._save_checkpoint()

    def _finish_update(self, line: dict[str, Any]) -> None:
        """What a checkpoint of the update just made holds beside weights; kept, for it may be written later."""
        state = {
            "prompts_drawn": self.prompts_drawn,
            "skipped_in_a_row": self.skipped_in_a_row,
            "line": line,
        }
        # Rollouts that were recorded are found by their update: there is no place in the data to keep.
        place = self.train_dataloader.state_dict() if self.recorded is None else None
        self.finished = Finished(self.global_steps, place, state)

    def _line(
        self, batch: KVBatchMeta, metrics: dict[str, Any], timing_raw: dict[str, float]
    ) -> dict[str, Any]:
        """What metrics.jsonl says about the update that was just made."""
        records = self._records(batch.keys, batch.partition_id)
        lengths = [r["response_tokens"] for r in records]
        seconds = dict(timing_raw)
        if self.recorded is not None:  # what it cost to generate them belongs to the step that trains on them
            for phase in ("gen", "step"):
                seconds[phase] += self.recorded_seconds
        line = {
            "step": self.global_steps,
            "epoch": (self.global_steps - 1) // self.steps_per_epoch,
            "prompts": len(batch) // self.config.actor_rollout_ref.rollout.n,
            "rollouts": len(batch),
            "tokens_generated": sum(lengths) + self.thrown["tokens_evicted"] + self.thrown["tokens_surplus"],
            **self.thrown,
            "tokens_prompt": sum(t["prompt_len"] for t in batch.tags if "prompt_len" in t),
            "response_length": sum(lengths) / len(lengths),
            "response_length_max": max(lengths),
            "truncated": sum(r["truncated"] for r in records) / len(records),
            "rollout_accuracy": sum(r["correct"] for r in records) / len(records),
            **_renamed(metrics),
            **{f"seconds/{k}": v for k, v in seconds.items()},
        }
        self.first_line = self.first_line or self.history.first_update() or line
        return line | {f"collapse/{k}": int(v) for k, v in collapse_flags(line, self.first_line).items()}

    def _compute_metrics(
        self,
        batch: KVBatchMeta,
        metrics: dict[str, Any],
        timing_raw: dict[str, float],
        global_steps: int,
        epoch: int,
    ) -> None:
        """One line of metrics.jsonl; replaces verl's, which wants advantages and values of every method."""
        line = self._line(batch, metrics, timing_raw)
        metrics.clear()
        metrics.update({k: v for k, v in line.items() if isinstance(v, int | float)})
        self.history.add_update(line)
        self.unwritten = None
        self.progress.step(global_steps, self.total_training_steps, line)
        self._finish_update(line)
        if self._save_is_due():
            self._save_checkpoint()

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def _validate(self) -> dict[str, float]:
        """verl calls this before the first update of this process, every `test_freq` updates, and after the last one.

        A run that resumes makes up for the evaluation that its checkpoint was written before.
        """
        if self.global_steps == 0:
            return self._evaluate("before", self.vopd.evaluate.final)
        last = self.global_steps >= self.total_training_steps
        found = {"evaluation/none": 0.0}  # verl wants some figure
        if last or self.global_steps % self.config.trainer.test_freq == 0:
            plan = self.vopd.evaluate.final if last else self.vopd.evaluate.during
            found = self._evaluate("after" if last else f"step{self.global_steps}", plan)
        if self.resumed_line:
            self.history.add_update(self.resumed_line | found)
            self.resumed_line = None
        return found

    def _evaluate(self, name: str, plan: Any) -> dict[str, float]:
        """Greedy answers of the current weights to every (file, view) of the plan; one record per question."""
        path = self.run_dir / "records" / f"{name}.jsonl"
        start = time.perf_counter()
        if not path.exists():
            write_records(path, self._answers(name, plan))
        groups: dict[str, list[bool]] = defaultdict(list)
        for record in read_records(path).records:
            groups[f"{record.split}/{record.view}"].append(record.correct)
        accuracy = {f"evaluation/{k}": sum(v) / len(v) for k, v in groups.items()}
        self.history.add_evaluation(
            {"name": name, "step": self.global_steps, "seconds": time.perf_counter() - start, **accuracy}
        )
        return accuracy

    def _answers(self, name: str, plan: Any) -> list[dict[str, Any]]:
        requests = [
            (rows, index, view)
            for part in plan
            for rows in [TripletDataset(str(part.file), None, None, max_samples=int(part.rows))]
            for index in range(len(rows))
            for view in part.views
        ]
        records: list[dict[str, Any]] = []
        size = int(self.vopd.evaluate.batch)
        for first in range(0, len(requests), size):
            batch = [(rows.row(index), view) for rows, index, view in requests[first : first + size]]
            records += self._answer(batch)
            self.progress.evaluation(name, len(records), len(requests))
        return records

    def _answer(self, requests: list[tuple[dict[str, Any], str]]) -> list[dict[str, Any]]:
        batch = self._requests([row for row, _ in requests], [view for _, view in requests])
        verl_internals.assign_non_tensor(batch, global_steps=self.global_steps, validate=True)
        tags = [{"is_prompt": True, "status": "pending", "global_steps": self.global_steps} for _ in requests]
        tq.kv_batch_put(keys=list(batch["uid"]), partition_id="val", tags=tags)
        self.agent_loop_manager.generate_sequences(batch)
        done, _ = self.replay_buffer.sample(
            global_steps=self.global_steps, partition_id="val", batch_size=len(requests)
        )
        if len(done) != len(requests):
            raise TrainingError(
                f"Evaluation: {len(requests) - len(done)} of {len(requests)} questions failed; the cause is in "
                f"{self.run_dir / 'log.txt'}."
            )
        keys = sorted(done.keys, key=_sort_key)
        records = self._records(keys, "val")
        tq.kv_clear(keys=keys, partition_id="val")
        return records

    # ---- checkpoints and the end --------------------------------------------------------------------------------

    def _save_is_due(self) -> bool:
        """By count, by time, and after the last update; not twice for one update."""
        if self._newest() == self.global_steps:
            return False
        passed = time.monotonic() - self.saved_at
        by_time = passed > max(60 * self.vopd.train.save_minutes, self.save_seconds / SAVING_SHARE)
        by_count = self.vopd.train.save_every > 0 and self.global_steps % self.vopd.train.save_every == 0
        return by_time or by_count or self.global_steps >= self.total_training_steps

    def _newest(self) -> int:
        return max((checkpoint.step for checkpoint in checkpoints.found(self.checkpoints)), default=0)

    def _save_checkpoint(self) -> None:
        """Everything that the run resumes from, as it was after the last finished update; replaces verl's."""
        assert self.finished is not None
        start, step = time.monotonic(), self.finished.step
        try:
            with checkpoints.writing(self.checkpoints, step) as folder:
                self.actor_rollout_wg.save_checkpoint(str(folder / ACTOR), None, step)
                torch.save(self.finished.data_state, folder / DATA)
                (folder / STATE).write_text(json.dumps(self.finished.state), encoding="utf-8")
                shutil.copyfile(self.run_dir / "config.yaml", folder / "config.yaml")
        except (OSError, SafetensorError) as error:
            newest = self._newest()
            kept = f"the last one is of update {newest}" if newest else "there is none yet"
            raise TrainingError(
                f"The checkpoint of update {step} could not be written to {self.checkpoints} "
                f"({explain(error).sentence}); {kept}. Make room there and run the same command again."
            ) from error
        checkpoints.prune(self.checkpoints, self.vopd.train.keep)
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - start

    def _load_checkpoint(self) -> None:
        """Resume from the newest checkpoint, which `vopd.runner.run` has looked at; replaces verl's, which unpickles."""
        found = checkpoints.found(self.checkpoints)
        self.global_steps = found[0].step if found else 0
        if found:
            folder = found[0].folder
            self.actor_rollout_wg.load_checkpoint(str(folder / ACTOR))
            if (place := torch.load(folder / DATA, weights_only=True)) is not None:
                self.train_dataloader.load_state_dict(place)
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            self.prompts_drawn = state["prompts_drawn"]
            self.skipped_in_a_row = state["skipped_in_a_row"]
            self.resumed_line = state["line"]
        if self.history.cut_back(self.global_steps) == self.global_steps:
            self.resumed_line = None  # the line was written before the interruption

    def fit(self, agent_loop_manager: Any) -> None:
        self.agent_loop_manager = agent_loop_manager
        with stop_requests.patiently():
            try:
                if self.recorded is not None and not self.vopd.rollout.replay:
                    self._generate_ahead()
                super().fit(agent_loop_manager)
            except stop_requests.Stopped:
                if self.finished and self.finished.step > self._newest():
                    self.progress.note(f"saving the checkpoint of update {self.finished.step}")
                    self._save_checkpoint()
                raise
            finally:
                if hasattr(self, "logger"):
                    self.logger.finish()
        if self.vopd.export:
            self.progress.note("writing the trained weights")
            self.actor_rollout_wg.export(str(self.run_dir / "model"), self.vopd.export)


@dataclasses.dataclass(frozen=True)
class Finished:
    """An update that was made: its number, the place in the prompt stream behind it, counters and its line."""

    step: int
    data_state: Any
    state: dict[str, Any]


def step_rollouts(keys: list[str], records: list[dict[str, Any]], limit: int) -> Rollouts:
    """A step's records as the contract's tensors; keys in canonical order."""
    correct_B = torch.tensor([bool(record["correct"]) for record in records])
    groups: dict[str, int] = {}
    return Rollouts(
        correct_B=correct_B,
        rewards_B=correct_B.to(torch.float32),
        truncated_B=torch.tensor([bool(record["truncated"]) for record in records]),
        lengths_B=torch.tensor([int(record["response_tokens"]) for record in records]),
        group_B=torch.tensor([groups.setdefault(_sort_key(key)[0], len(groups)) for key in keys]),
        limit=limit,
    )


def row_fields(method: Method, rollouts: Rollouts) -> dict[str, torch.Tensor]:
    """What travels with the rows beside tokens: weights, kept, and advantages per token (jagged)."""
    lengths = rollouts.lengths_B.tolist()
    with calling(method, "prepare"):
        fields = checked(method.prepare(rollouts), len(lengths))
    if method.advantage is not None:
        if "advantages" in fields:
            raise UserError(
                f"The method names the advantage '{method.advantage}' and prepares others; drop one."
            )
        mask_BT = (torch.arange(max(lengths)) < rollouts.lengths_B[:, None]).to(torch.float32)
        fields["advantages"] = advantages(method.advantage, rollouts.rewards_B, rollouts.group_B, mask_BT)
    elif "advantages" in fields:
        fields["advantages"] = fields["advantages"][:, None].expand(-1, max(lengths))
    if "advantages" in fields:
        rows = [row_T[:length] for row_T, length in zip(fields["advantages"], lengths, strict=True)]
        fields["advantages"] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    return fields


def _sort_key(key: str) -> tuple[str, int]:
    uid, session, _ = key.rsplit("_", 2)
    return uid, int(session)


def _renamed(metrics: dict[str, Any]) -> dict[str, Any]:
    """`update/token/divergence` -> `divergence`, `update/seconds/student` -> `seconds/student`, and so on."""
    line = {}
    for key, value in metrics.items():
        name = key.removeprefix("update/").removeprefix("token/")
        if isinstance(value, int | float) and not (
            isinstance(value, float) and math.isnan(value) and "mfu" in name
        ):
            line[{"update_loss": "loss"}.get(name, name)] = value
    return line
