"""Rollouts: a triplet row in; sampled responses, their rewards and every rendered view out, into TransferQueue.

verl's agent-loop worker hands prompts out; this subclass decides what becomes of one. It renders each view of a triplet
once for all n rollouts and stores it once (`stored_views`), gives every request its own seed, and stores the prompt ids
that vLLM sampled from, so that the trainer scores exactly these.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from vllm.sampling_params import RequestOutputKind

from vopd.backbone import stored_views, verl_internals
from vopd.backbone.rendering import Rendered, render
from vopd.backbone.replay_buffer import METRIC
from vopd.backbone.rollout_servers import request_id
from vopd.backbone.rows import Answer, Fields, Prompt, Recorded, Tag, TrainingFields, Trajectory
from vopd.common import heartbeat, images
from vopd.common.failures import Failure, explain
from vopd.common.seeding import request_seed
from vopd.errors import UserError
from vopd.evaluation.scoring import is_correct, parse_answer
from vopd.views import VIEWS

if TYPE_CHECKING:
    from data.schema import Triplet


IDS_ALONE = {"detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
"""vLLM would make text of every token, and tell of every token's arrival; only the ids at the end are read."""


class Request(TypedDict):
    """A `Prompt` with its views rendered, and the index of the rollout: one request to vLLM."""

    row: Triplet
    views: list[str]
    uid: str
    global_steps: int
    recorded: NotRequired[Recorded]
    rendered: dict[str, Rendered]
    session_id: int


def decode(row: Triplet) -> Triplet:
    """The row with `image` and `crop` as RGB images, as everything else decodes them (vopd/common/images.py).

    Raises:
        UserError: bytes that are not a whole image, or too large a one; names row and column.
    """
    decoded: dict[str, Any] = {**row}
    for column in ("image", "crop"):
        try:
            decoded[column] = images.decode(decoded[column]["bytes"])
        except images.PictureError as error:
            raise UserError(f"Row {row['id']}, column {column}: {error}") from error
    return cast("Triplet", decoded)


def tensor_bytes(held: object) -> int:
    """Bytes of all tensors in nested mappings."""
    if isinstance(held, torch.Tensor):
        return held.nbytes
    return sum(map(tensor_bytes, held.values())) if isinstance(held, dict) else 0


def training_limit(settings: Any) -> int:
    """Most tokens of a response in training: `rollout.train_share` of what evaluation allows."""
    return max(1, int(settings.rollout.train_share * settings.rollout.max_response_tokens))


class ViewRolloutWorker(verl_internals.AgentLoopWorker):
    """One request = one (triplet, view, rollout index).

    Its process is made early, while the trainer loads the model, and `start`ed when the servers are up.
    """

    def __init__(self) -> None:
        """Only imports; see `start`."""
        self.found: list[Failure] = []

    def start(self, *args: Any) -> None:
        """What verl's constructor does."""
        super().__init__(*args)

    async def look(self) -> None:
        """Start the heartbeat, the event loop's too."""
        heartbeat.start("rollout worker", asyncio.get_running_loop())

    async def failures(self) -> list[Failure]:
        """Why rollouts of this worker have failed, the first one first."""
        return self.found

    async def until_death(self) -> None:
        """Never returns: the call fails when this process is gone."""
        await asyncio.Event().wait()

    def _note(self, error: Exception) -> None:
        failure = explain(error)
        process = failure.process or f"rollout worker (pid {os.getpid()})"
        self.found.append(replace(failure, process=process))

    async def _run_prompt(
        self,
        prompt: Prompt,
        sampling_params: dict[str, Any],
        trajectory: Trajectory,
        trace: bool = False,
    ) -> None:
        """Render every view once, answer n times, store the group in one go, and tell the trainer how it ended.

        verl stores each response by itself; what the queue does for one response takes longer than a short one.
        """
        partition = "val" if trajectory["validate"] else "train"
        status = "failure"
        try:
            await self._run_group(prompt, sampling_params, trajectory, partition)
            status = "finished"
        except (
            Exception
        ) as error:  # the trainer waits for every group: it is told, then the error reaches the log
            self._note(error)
            raise
        finally:
            await tq.async_kv_put(key=prompt["uid"], partition_id=partition, tag={"status": status})

    async def _run_group(
        self, prompt: Prompt, sampling_params: dict[str, Any], trajectory: Trajectory, partition: str
    ) -> None:
        views = prompt["views"].split(",")
        rendered = await asyncio.get_running_loop().run_in_executor(None, self._render, prompt["row"], views)
        rollout = self.config.actor_rollout_ref.rollout
        count = rollout.val_kwargs.n if trajectory["validate"] else rollout.n
        requests = [
            cast(Request, {**prompt, "views": views, "rendered": rendered, "session_id": i})
            for i in range(count)
        ]
        # All of them settle before the trainer hears of a failure: none may write after the group is dropped.
        outputs = await asyncio.gather(
            *(self._respond(sampling_params, trajectory, request) for request in requests),
            return_exceptions=True,
        )
        for output in outputs:
            if isinstance(output, BaseException):
                raise output
        share = 0.0
        if not trajectory["validate"]:
            stored = {view: r.for_training() for view, r in rendered.items()}
            await stored_views.put(prompt["uid"], stored)
            share = tensor_bytes(stored) / count
        await self._store(outputs, requests, partition, share)

    def _render(self, row: Triplet, views: list[str]) -> dict[str, Rendered]:
        decoded = decode(row)
        settings = self.config.vopd.rollout
        template: Any = OmegaConf.to_container(settings.chat_template)
        return {
            view: render(
                self.processor, VIEWS[view](decoded), row["id"], settings.max_prompt_tokens, template
            )
            for view in views
        }

    async def _respond(
        self, sampling_params: dict[str, Any], trajectory: Trajectory, request: Request
    ) -> Any:
        """One request to vLLM, or one recorded response. The first view is the one that generates."""
        row, rollout = request["row"], request["session_id"]
        if "recorded" in request:
            recorded = request["recorded"]
            tokens, log_probs = recorded["tokens"][rollout], recorded["log_probs"][rollout]
            return SimpleNamespace(token_ids=tokens, log_probs=log_probs, extra_fields={})
        rendered = request["rendered"][request["views"][0]]
        seed = request_seed(self.config.vopd.seed, trajectory["step"], row["id"], rollout)
        limit = {} if trajectory["validate"] else {"max_tokens": training_limit(self.config.vopd)}
        return await self.llm_client.generate(
            request_id=request_id(request["uid"]),
            prompt_ids=rendered.prompt_ids_P.tolist(),
            sampling_params={**sampling_params, **IDS_ALONE, **limit, "seed": seed},
            image_data=rendered.images,
        )

    async def _store(self, outputs: list[Any], requests: list[Request], partition: str, share: float) -> None:
        fields: list[Fields] = []
        tags: list[Tag] = []
        for output, request in zip(outputs, requests, strict=True):
            view = request["views"][0]
            record = self._record(output.token_ids, request["row"], view)
            training = partition == "train"
            fields.append(self._training_fields(output, record, request) if training else {"record": record})
            prompt_len, response_len = len(request["rendered"][view].prompt_ids_P), len(output.token_ids)
            tags.append(
                {
                    "status": "success",
                    "prompt_len": prompt_len,
                    "response_len": response_len,
                    "seq_len": prompt_len + response_len,
                    "global_steps": request["global_steps"],
                    "min_global_steps": output.extra_fields.get("min_global_steps"),
                    "max_global_steps": output.extra_fields.get("max_global_steps"),
                    "stored_bytes": tensor_bytes(fields[-1]) + share,
                }
            )
        await tq.async_kv_batch_put(
            keys=[f"{request['uid']}_{request['session_id']}_0" for request in requests],
            fields=verl_internals.list_of_dict_to_tensordict(fields),
            tags=tags,
            partition_id=partition,
        )

    def _record(self, token_ids: list[int], row: Triplet, view: str) -> Answer:
        """The per-question record; the only place where an answer is parsed, for reward and evaluation alike."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        parsed = parse_answer(text, row["answer_type"], row["options"])
        return {
            "id": row["id"],
            "family": row["family"],
            "view": view,
            "split": row["split"],
            "prompt": row["question"],
            "response": text,
            "response_tokens": len(token_ids),
            "truncated": not token_ids or token_ids[-1] != self.tokenizer.eos_token_id,
            "parsed": parsed.value,
            "gold": row["answer"],
            "correct": is_correct(parsed, row["answer"], row["answer_type"]),
        }

    def _training_fields(self, output: Any, record: Answer, request: Request) -> TrainingFields:
        prompt_P = request["rendered"][request["views"][0]].prompt_ids_P
        response_R = torch.tensor(output.token_ids, dtype=torch.int64)
        return {
            "record": record,
            "uid": request["uid"],
            "prompts": prompt_P,
            "responses": response_R,
            "input_ids": torch.cat([prompt_P, response_R]),
            "response_mask": torch.ones_like(response_R),
            "loss_mask": torch.ones_like(response_R),
            "rollout_log_probs": torch.tensor(output.log_probs, dtype=torch.float32),
            # Where verl's group filter looks for its metric.
            "extra_fields": {"reward_extra_info": {METRIC: float(record["correct"])}},
        }


def worker_name(config: Any, index: int) -> str:
    """Name of a rollout worker's Ray actor; unique per run folder."""
    return f"vopd_rollout_{config.vopd.run_dir}_{index}"


def early_workers(config: Any) -> list[Any]:
    """Start the worker processes, one per node in turn. Keep the handles: Ray ends an actor nobody holds."""
    nodes = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) > 0]
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    return [
        ray.remote(ViewRolloutWorker)
        .options(name=worker_name(config, i), scheduling_strategy=strategy(nodes[i % len(nodes)], soft=True))
        .remote()
        for i in range(config.actor_rollout_ref.rollout.agent.num_workers)
    ]


class ViewRolloutManager(verl_internals.AgentLoopManagerTQ):
    """verl's manager with our workers (`rollout.agent.agent_loop_manager_class`)."""

    async def _init_agent_loop_workers(self) -> None:
        count = self.rollout_config.agent.num_workers
        self.agent_loop_workers = [ray.get_actor(worker_name(self.config, i)) for i in range(count)]
        arguments = (self.config, self.llm_client, self.teacher_client, self.reward_loop_worker_handles)
        await asyncio.gather(*(w.start.remote(*arguments) for w in self.agent_loop_workers))
        await asyncio.gather(*(w.look.remote() for w in self.agent_loop_workers))
