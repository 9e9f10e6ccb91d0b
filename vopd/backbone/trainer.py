"""The training loop: verl's synchronous V1 trainer, told to run a method and to keep an honest record.

One step: n rollouts per prompt -> rows in canonical order -> [old log-probs, advantages where the method asks] ->
update (scorers, student, teachers; inside the worker) -> weight sync. Evaluation goes through the same rollout.
"""

from __future__ import annotations

import importlib
import json
import math
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta
from verl.utils.debug import marked_timer
from verl.utils.metric import reduce_metrics

from vopd.backbone import seams
from vopd.backbone.dataset import TripletDataset
from vopd.backbone.progress import Progress
from vopd.backbone.rollout import early_workers
from vopd.backbone.worker import MethodWorker
from vopd.evaluation.records import write_records
from vopd.method import build

NAME = "vopd"
POLL_SECONDS = 0.02  # verl waits 2 s between looks at the queue: most of a step on a small model
UPDATE_FIELDS = ("input_ids", "responses", "response_mask", "loss_mask", "rollout_log_probs", "rendered")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is kept."""


@seams.register_trainer(NAME)
class Trainer(seams.PPOTrainerSync):
    """See the module's docstring."""

    def __init__(self, config: Any) -> None:
        self.vopd = config.vopd
        self.run_dir = Path(self.vopd.run_dir)
        beside = Path(self.vopd.recipe_folder) if self.vopd.recipe_folder else None
        self.method = build(OmegaConf.to_container(self.vopd.method, resolve=True), beside)  # type: ignore[arg-type]
        self.views = tuple(
            dict.fromkeys([self.method.rollout.view, *(s.view for s in self.method.scorers.values())])
        )
        self.progress = Progress(self.run_dir)
        self.prompts_drawn = 0
        self.skipped_in_a_row = 0
        self.train_dataloader_it: Any = None
        super().__init__(config)
        # The training process is about to import and load for a while: load what comes next meanwhile.
        threading.Thread(
            target=importlib.import_module, args=(seams.ROLLOUT_SERVER_MODULE,), daemon=True
        ).start()
        self.progress.note("loading the model into the trainer")

    # ---- construction -------------------------------------------------------------------------------------------

    def _build_replay_buffer(self) -> Any:
        self.trainer_mode = "sync"  # verl takes every other name for an asynchronous trainer
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = POLL_SECONDS
        return buffer

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        self.role_worker_mapping[seams.Role.ActorRollout] = ray.remote(MethodWorker)
        self.rollout_workers = early_workers(self.config)

    # ---- prompts ------------------------------------------------------------------------------------------------

    def _fetch_one_gen_batch(self) -> Any:
        if self.train_dataloader_it is None:
            self.train_dataloader_it = iter(self.train_dataloader)
        rows = next(self.train_dataloader_it, None)
        if rows is None:
            self.train_dataloader_it = iter(self.train_dataloader)
            rows = next(self.train_dataloader_it)
        return self._requests(list(rows["row"]), [",".join(self.views)] * len(rows["row"]))

    def _requests(self, rows: list[dict[str, Any]], views: list[str]) -> Any:
        """Rows as verl's prompt batch. Keys count upwards, so that sorting them is sorting the prompt stream.

        views: per row, the views to render, joined by commas; the first one generates.
        """
        uids = [f"{self.prompts_drawn + i:010d}" for i in range(len(rows))]
        self.prompts_drawn += len(rows)
        return seams.get_tensordict(
            {
                "row": rows,
                "views": views,
                "uid": uids,
                "index": list(range(len(rows))),
                "dummy_tensor": torch.zeros(len(rows), 1, dtype=torch.uint8),
            }
        )

    # ---- one step -----------------------------------------------------------------------------------------------

    def _step_once(
        self, metrics: dict[str, Any], timing_raw: dict[str, float], sample_batch_size: int
    ) -> KVBatchMeta:
        with marked_timer("gen", timing_raw):
            batch, sampled = self.replay_buffer.sample(
                global_steps=self.global_steps, partition_id="train", batch_size=sample_batch_size
            )
            metrics.update(sampled)
            self.on_sample_end()
        batch = self._arrange(self._complete(batch, sample_batch_size))
        batch.extra_info["temperature"] = 1.0
        if self.method.needs_old_log_probs:
            with marked_timer("old_log_prob", timing_raw):
                batch = self._compute_old_log_prob(batch, metrics=metrics)
        if self.method.advantage is not None:
            with marked_timer("adv", timing_raw):
                batch = self._compute_advantage(batch, metrics=metrics)
        with marked_timer("update_actor", timing_raw):
            self._update_actor(batch, metrics)
        return batch

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
            parts = seams.get_seqlen_balanced_partitions(lengths, k_partitions=ranks, equal_size=True)
            for rank, part in enumerate(parts):
                shares[rank].extend(mini[j] for j in sorted(part))
        batch.reorder([i for rank in range(ranks) for i in shares[rank]])
        return batch

    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        rows = len(batch) // self.vopd.train.updates_per_batch
        extra = [name for name in ("old_log_probs", "advantages") if name in (batch.fields or ())]
        batch.fields = [*UPDATE_FIELDS, *extra]
        batch.extra_info.update(
            global_batch_size=rows,
            mini_batch_size=rows,
            epochs=1,
            seed=self.vopd.seed,
            dataloader_kwargs={"shuffle": False},
        )
        output = self.actor_rollout_wg.update_actor(batch)
        update = reduce_metrics(dict(output["metrics"]))
        metrics.update({f"update/{k}": v for k, v in update.items()})
        self._guard(update)
        return batch

    def _guard(self, update: dict[str, Any]) -> None:
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if update["skipped_updates"] > 0 else 0
        if self.skipped_in_a_row >= self.vopd.train.max_skipped_updates:
            raise TrainingError(
                f"{self.skipped_in_a_row} updates in a row had a non-finite gradient and were skipped; stopped at "
                f"step {self.global_steps}. The last checkpoint is in {self.config.trainer.default_local_dir}."
            )

    # ---- the record ---------------------------------------------------------------------------------------------

    def _compute_metrics(
        self,
        batch: KVBatchMeta,
        metrics: dict[str, Any],
        timing_raw: dict[str, float],
        global_steps: int,
        epoch: int,
    ) -> None:
        """One line of metrics.jsonl; replaces verl's, which wants advantages and values of every method."""
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["record"])
        records = [seams.plain(r) for r in data["record"]]
        lengths = [r["response_tokens"] for r in records]
        line = {
            "step": global_steps,
            "epoch": epoch,
            "prompts": len(batch) // self.config.actor_rollout_ref.rollout.n,
            "rollouts": len(batch),
            "tokens_generated": sum(lengths),
            "tokens_prompt": sum(t["prompt_len"] for t in batch.tags if "prompt_len" in t),
            "response_length": sum(lengths) / len(lengths),
            "response_length_max": max(lengths),
            "truncated": sum(r["truncated"] for r in records) / len(records),
            "rollout_accuracy": sum(r["correct"] for r in records) / len(records),
            **_renamed(metrics),
            **{f"seconds/{k}": v for k, v in timing_raw.items()},
        }
        metrics.clear()
        metrics.update({k: v for k, v in line.items() if isinstance(v, int | float)})
        with open(self.run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        self.progress.step(global_steps, self.total_training_steps, line)

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def _validate(self) -> dict[str, float]:
        """verl calls this before training, every `test_freq` steps and after the last one."""
        last = self.global_steps >= self.total_training_steps
        if self.global_steps == 0:
            return self._evaluate("before", self.vopd.evaluate.final)
        if last:
            return self._evaluate("after", self.vopd.evaluate.final)
        return self._evaluate(f"step{self.global_steps}", self.vopd.evaluate.during)

    def _evaluate(self, name: str, plan: Any) -> dict[str, float]:
        """Greedy answers of the current weights to every (file, view) of the plan; one record per question."""
        path = self.run_dir / "records" / f"{name}.jsonl"
        if path.exists():
            return {"evaluation/reused": 1.0}
        requests = [
            (rows, index, view)
            for part in plan
            for rows in [TripletDataset(str(part.file), None, None, max_samples=int(part.rows))]
            for index in range(len(rows))
            for view in part.views
        ]
        records: list[dict[str, Any]] = []
        start, size = time.perf_counter(), int(self.vopd.evaluate.batch)
        for first in range(0, len(requests), size):
            batch = [(rows.row(index), view) for rows, index, view in requests[first : first + size]]
            records += self._answer(batch)
            self.progress.evaluation(name, len(records), len(requests))
        write_records(path, records)
        groups: dict[str, list[bool]] = defaultdict(list)
        for record in records:
            groups[f"{record['split']}/{record['view']}"].append(record["correct"])
        accuracy = {f"evaluation/{k}": sum(v) / len(v) for k, v in groups.items()}
        line = {"name": name, "step": self.global_steps, "seconds": time.perf_counter() - start, **accuracy}
        with open(self.run_dir / "evaluations.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        return accuracy

    def _answer(self, requests: list[tuple[dict[str, Any], str]]) -> list[dict[str, Any]]:
        batch = self._requests([row for row, _ in requests], [view for _, view in requests])
        seams.assign_non_tensor(batch, global_steps=self.global_steps, validate=True)
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
        data = tq.kv_batch_get(keys=keys, partition_id="val", select_fields=["record"])
        records = [dict(seams.plain(r)) for r in data["record"]]
        tq.kv_clear(keys=keys, partition_id="val")
        return records

    # ---- checkpoints and the end --------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        super()._save_checkpoint()
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        (folder / "vopd.json").write_text(json.dumps({"prompts_drawn": self.prompts_drawn}))

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        if self.global_steps and (folder / "vopd.json").exists():
            self.prompts_drawn = json.loads((folder / "vopd.json").read_text())["prompts_drawn"]

    def fit(self, agent_loop_manager: Any) -> None:
        super().fit(agent_loop_manager)
        if self.vopd.export:
            self.progress.note("writing the trained weights")
            self.actor_rollout_wg.export(str(self.run_dir / "model"), self.vopd.export)


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
