"""The training loop: verl's synchronous V1 trainer, told to run a method and to keep an honest record.

One step: n rollouts per prompt -> rows in canonical order -> rewards, and advantages, weights, kept rows where the
method has them -> update (old log-probs, scorers, student, teachers; inside the worker) -> weight sync. Evaluation goes
through the same rollout. Rollouts can be stored and trained on later, by this run or another (`recording`).
"""

from __future__ import annotations

import dataclasses
import importlib
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils.debug import marked_timer
from verl.utils.metric import reduce_metrics

from vopd import method as contract
from vopd.backbone import recorded_rollouts, stop_requests, stored_views, verl_internals
from vopd.backbone.evaluations import Evaluations, Questions
from vopd.backbone.progress import Progress
from vopd.backbone.prompt_stream import PromptStream
from vopd.backbone.replay_buffer import GroupBuffer
from vopd.backbone.rollout import early_workers, training_limit
from vopd.backbone.rollout_servers import ServerManager
from vopd.backbone.rows import Answer
from vopd.backbone.run_history import History
from vopd.backbone.saving import Finished, Saving
from vopd.backbone.step_rows import (
    arrange,
    prompts_of,
    records_of,
    row_fields,
    sort_key,
    step_rollouts,
    store,
)
from vopd.backbone.tracking import Trackers
from vopd.backbone.update_record import update_line
from vopd.backbone.worker import MethodWorker
from vopd.common.collapse import collapse_flags
from vopd.common.failures import ExplainedError, Failure
from vopd.errors import TrainingError
from vopd.method import calling
from vopd.method_checks import checked_rewards

NAME = "vopd"
LOOK_SECONDS = 5.0
POLL_SECONDS = 0.02  # verl waits 2 s between looks at the queue: most of a step on a small model
UPDATE_FIELDS = ("input_ids", "responses", "response_mask", "loss_mask", "rollout_log_probs", "uid")


@verl_internals.register_trainer(NAME)
class Trainer(verl_internals.PPOTrainerSync):
    """Runs one method: verl's loop, with this project's prompts, rows, record, evaluations and checkpoints."""

    def __init__(self, config: Any) -> None:
        self.vopd = config.vopd
        self.run_dir = Path(self.vopd.run_dir)
        self.method = contract.of(self.vopd)
        self.progress = Progress(self.run_dir)
        self.prompts = PromptStream()
        self.refilled = 0
        self.skipped_in_a_row = 0
        self.first_line: dict[str, Any] | None = None
        self.thrown: dict[str, int] = {}
        self.unwritten: Callable[[], dict[str, Any]] | None = None
        self.history = History(self.run_dir)
        self.saving = Saving(self.run_dir, self.vopd.train)
        self.evaluations = Evaluations(
            self.run_dir, int(self.vopd.evaluate.batch), self.history, self.progress, self._answer
        )
        self.finished: Finished | None = None
        self.resumed_line: dict[str, Any] | None = None
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
            rows = self.prompts.draw(self.train_dataloader, num_prompts or self.vopd.train.prompts)
            batch = self.prompts.requests(rows, [views] * len(rows))
        else:
            groups, self.recorded_seconds = recorded_rollouts.read(self.recorded, self.global_steps)
            rows = [self.prompts.row(self.train_dataset, group.row_id, self.recorded) for group in groups]
            batch = self.prompts.requests(rows, [views] * len(rows), groups)
        verl_internals.assign_non_tensor(batch, global_steps=self.global_steps)
        return batch

    def _add_prompts_to_generate(self, num_prompts: int) -> int:
        """verl asks for prompts in place of filtered groups; it would do so for ever."""
        self.refilled += num_prompts
        if self.refilled > self.vopd.train.max_refills * self.vopd.train.prompts:
            raise TrainingError(
                f"Step {self.global_steps}: {self.refilled} more prompts would be needed to replace groups whose "
                f"{self.config.actor_rollout_ref.rollout.n} answers are all correct or all incorrect; the policy is "
                "nearly always correct, or nearly always incorrect, on this data. Raise train.max_refills or "
                "train.rollouts, or take other data."
            )
        return super()._add_prompts_to_generate(num_prompts)

    def _generate_ahead(self) -> None:
        """All rollouts of the run from the weights as they are, one file a step; whole files are kept."""
        folder, steps = self.run_dir / "rollouts", self.total_training_steps
        if all(recorded_rollouts.path(folder, step).exists() for step in range(1, steps + 1)):
            return
        if self.global_steps:
            raise TrainingError(f"{folder} lacks rollouts of the initial weights; remove {self.run_dir}.")
        for step in range(1, steps + 1):
            rows = self.prompts.draw(self.train_dataloader, self.vopd.train.prompts)
            if not recorded_rollouts.path(folder, step).exists():
                start = time.perf_counter()
                batch = self.prompts.requests(rows, [self.method.rollout.view] * len(rows))
                verl_internals.assign_non_tensor(batch, global_steps=step)
                self._submit_batch_to_rollout(batch)
                done, _ = self.replay_buffer.sample(
                    global_steps=step, partition_id="train", batch_size=len(rows)
                )
                store(self._complete(done, len(rows)), folder, step, time.perf_counter() - start)
                tq.kv_clear(keys=done.keys, partition_id="train")
                stored_views.clear(prompts_of(done.keys))
            self.progress.generation(step, steps)

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
        batch = arrange(
            self._complete(batch, sample_batch_size),
            self.resource_pool_manager.get_n_gpus(),
            self.vopd.train.updates_per_batch,
        )
        batch.extra_info["temperature"] = 1.0
        if self.vopd.rollout.record:
            store(batch, self.run_dir / "rollouts", self.global_steps, timing_raw["gen"])
        with marked_timer("prepare", timing_raw):
            prepared = self._prepare(batch, metrics)
        stop_requests.check()  # from here on the weights are under way to those of the next update
        with marked_timer("update_actor", timing_raw):
            self._update_actor(batch, metrics, prepared)
        return batch

    def _prepare(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> list[str]:
        """Rewards, and what the method makes of the whole step; names of the fields that the rows were given."""
        keys = sorted(batch.keys, key=sort_key)
        records = records_of(keys, batch.partition_id)
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

    def _complete(self, batch: KVBatchMeta, prompts: int) -> KVBatchMeta:
        """All rollouts of all prompts, or a sentence: verl would fill the place of a failed group with padding."""
        expected = prompts * self.config.actor_rollout_ref.rollout.n
        if len(batch) != expected:
            raise TrainingError(
                f"Step {self.global_steps}: {expected - len(batch)} of {expected} rollouts failed; the cause is in "
                f"{self.run_dir / 'log.txt'}."
            )
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
        stored_views.clear(prompts_of(batch.keys))
        update = reduce_metrics(dict(output["metrics"]))
        for name in ("scorer_tokens", "update_rows", "images_encoded"):
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
                f"step {self.global_steps}. The last checkpoint is in {self.saving.folder}."
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
            "prompts_drawn": self.prompts.drawn,
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
        seconds = dict(timing_raw)
        if self.recorded is not None:  # what it cost to generate them belongs to the step that trains on them
            for phase in ("gen", "step"):
                seconds[phase] += self.recorded_seconds
        line = update_line(
            self.global_steps,
            (self.global_steps - 1) // self.steps_per_epoch,
            self.config.actor_rollout_ref.rollout.n,
            records_of(batch.keys, batch.partition_id),
            batch.tags,
            self.thrown,
            metrics,
            seconds,
        )
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
        if self.saving.due(self.global_steps, self.total_training_steps):
            self._save_checkpoint()

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def _validate(self) -> dict[str, float]:
        """verl calls this before the first update of this process, every `test_freq` updates, and after the last one.

        A run that resumes makes up for the evaluation that its checkpoint was written before.
        """
        if self.global_steps == 0:
            return self.evaluations.make("before", 0, self.vopd.evaluate.final)
        last = self.global_steps >= self.total_training_steps
        found = {"evaluation/none": 0.0}  # verl wants some figure
        if last or self.global_steps % self.config.trainer.test_freq == 0:
            plan = self.vopd.evaluate.final if last else self.vopd.evaluate.during
            name = "after" if last else f"step{self.global_steps}"
            found = self.evaluations.make(name, self.global_steps, plan)
        if self.resumed_line:
            self.history.add_update(self.resumed_line | found)
            self.resumed_line = None
        return found

    def _answer(self, requests: Questions) -> list[Answer]:
        batch = self.prompts.requests([row for row, _ in requests], [view for _, view in requests])
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
        keys = sorted(done.keys, key=sort_key)
        records = records_of(keys, "val")
        tq.kv_clear(keys=keys, partition_id="val")
        return records

    # ---- checkpoints and the end --------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        """Everything that the run resumes from, as it was after the last finished update; replaces verl's."""
        assert self.finished is not None
        self.saving.save(self.finished, self.actor_rollout_wg)

    def _load_checkpoint(self) -> None:
        """Resume from the newest checkpoint; replaces verl's, which unpickles."""
        found = self.saving.load(self.actor_rollout_wg)
        self.global_steps = found.step if found else 0
        if found:
            if found.data_state is not None:
                self.train_dataloader.load_state_dict(found.data_state)
            self.prompts.drawn = found.state["prompts_drawn"]
            self.skipped_in_a_row = found.state["skipped_in_a_row"]
            self.resumed_line = found.state["line"]
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
                if self.finished and self.finished.step > self.saving.newest():
                    self.progress.note(f"saving the checkpoint of update {self.finished.step}")
                    self._save_checkpoint()
                raise
            finally:
                if hasattr(self, "logger"):
                    self.logger.finish()
        if self.vopd.export:
            self.progress.note("writing the trained weights")
            self.actor_rollout_wg.export(str(self.run_dir / "model"), self.vopd.export)
