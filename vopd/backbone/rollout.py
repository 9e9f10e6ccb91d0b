"""Rollouts: a triplet row in; sampled responses, their rewards and every rendered view out, into TransferQueue.

verl's agent-loop worker does the bookkeeping of groups; this subclass decides what one request is. It renders each
view of a triplet once for all n rollouts, gives every request its own seed, and stores the prompt ids that vLLM
sampled from, so that the trainer scores exactly these.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast
from uuid import uuid4

import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf

from vopd.backbone import verl_internals
from vopd.backbone.rendering import Rendered, render
from vopd.backbone.replay_buffer import METRIC
from vopd.backbone.rows import Answer, Fields, Prompt, Recorded, Tag, TrainingFields, Trajectory
from vopd.common import heartbeat, images
from vopd.common.failures import Failure, explain
from vopd.common.seeding import request_seed
from vopd.errors import UserError
from vopd.evaluation.scoring import is_correct, parse_answer
from vopd.views import VIEWS

if TYPE_CHECKING:
    from data.schema import Triplet


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
        """Render every view once, then let verl run the group's n rollouts."""
        views = prompt["views"].split(",")
        try:
            rendered = await asyncio.get_running_loop().run_in_executor(
                None, self._render, prompt["row"], views
            )
        except Exception as error:
            # The trainer waits for every group: tell it, then let the error reach the log.
            self._note(error)
            partition = "val" if trajectory["validate"] else "train"
            await tq.async_kv_put(key=prompt["uid"], partition_id=partition, tag={"status": "failure"})
            raise
        request = {**prompt, "views": views, "rendered": rendered}
        await super()._run_prompt(request, sampling_params, trajectory, trace)

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

    async def _run_agent_loop(
        self,
        sampling_params: dict[str, Any],
        trajectory: Trajectory,
        *,
        agent_name: str,
        trace: bool = True,
        **kwargs: Any,
    ) -> None:
        """One request to vLLM, or one recorded response. The first view is the one that generates."""
        try:
            await self._run_request(sampling_params, trajectory, cast(Request, kwargs))
        except Exception as error:  # verl marks the group as failed, and forgets why
            self._note(error)
            raise

    async def _run_request(
        self, sampling_params: dict[str, Any], trajectory: Trajectory, request: Request
    ) -> None:
        row, rollout = request["row"], request["session_id"]
        view = request["views"][0]
        if "recorded" in request:
            recorded = request["recorded"]
            tokens, log_probs = recorded["tokens"][rollout], recorded["log_probs"][rollout]
            output: Any = SimpleNamespace(token_ids=tokens, log_probs=log_probs, extra_fields={})
        else:
            rendered = request["rendered"][view]
            seed = request_seed(self.config.vopd.seed, trajectory["step"], row["id"], rollout)
            limit = {} if trajectory["validate"] else {"max_tokens": training_limit(self.config.vopd)}
            output = await self.llm_client.generate(
                request_id=uuid4().hex,
                prompt_ids=rendered.prompt_ids_P.tolist(),
                sampling_params={**sampling_params, **limit, "seed": seed},
                image_data=rendered.images,
            )
        await self._store(output, trajectory, request)

    async def _store(self, output: Any, trajectory: Trajectory, request: Request) -> None:
        view = request["views"][0]
        response_R = torch.tensor(output.token_ids, dtype=torch.int64)
        record = self._record(output.token_ids, request["row"], view)
        fields: Fields = {"record": record}
        if not trajectory["validate"]:
            fields = self._training_fields(output, response_R, record, request)
        prompt_len = len(request["rendered"][view].prompt_ids_P)
        tag: Tag = {
            "status": "success",
            "prompt_len": prompt_len,
            "response_len": len(response_R),
            "seq_len": prompt_len + len(response_R),
            "global_steps": request["global_steps"],
            "min_global_steps": output.extra_fields.get("min_global_steps"),
            "max_global_steps": output.extra_fields.get("max_global_steps"),
        }
        await tq.async_kv_batch_put(
            keys=[f"{request['uid']}_{request['session_id']}_0"],
            fields=verl_internals.list_of_dict_to_tensordict([fields]),
            tags=[tag],
            partition_id="val" if trajectory["validate"] else "train",
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

    def _training_fields(
        self, output: Any, response_R: torch.Tensor, record: Answer, request: Request
    ) -> TrainingFields:
        rendered = request["rendered"]
        prompt_P = rendered[request["views"][0]].prompt_ids_P
        return {
            "record": record,
            "prompts": prompt_P,
            "responses": response_R,
            "input_ids": torch.cat([prompt_P, response_R]),
            "response_mask": torch.ones_like(response_R),
            "loss_mask": torch.ones_like(response_R),
            "rollout_log_probs": torch.tensor(output.log_probs, dtype=torch.float32),
            # Where verl's group filter looks for its metric.
            "extra_fields": {"reward_extra_info": {METRIC: float(record["correct"])}},
            "rendered": {view: r.for_training() for view, r in rendered.items()},
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
