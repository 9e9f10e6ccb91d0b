"""The training worker: verl's, with the scoring engine, a method attached to it, and an export of the weights."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack

from vopd import method
from vopd.backbone import stored_views, verl_internals, weight_sync
from vopd.backbone.engine import ScoringEngine
from vopd.backbone.weight_sockets import own
from vopd.common import heartbeat


class ScoringTrainingWorker(verl_internals.TrainingWorker):
    """verl's TrainingWorker on our engine, on CPU as on GPU."""

    def __init__(self, config: Any) -> None:
        if verl_internals.get_device_name() == "cpu":
            # Ranks work while the rollout waits, so they share all cores; every other process keeps to one thread.
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["WORLD_SIZE"])))
            # verl would ask for "cpu:gloo,cpu:gloo", which torch refuses; it skips that once a group exists.
            verl_internals.initialize_global_process_group_ray(backend="cpu:gloo")
        verl_internals.register_engine(ScoringEngine)
        super().__init__(config)

    def log_probs(self, data: TensorDict) -> torch.Tensor:
        """Log-probs of all rows before the first mini-batch, in micro-batches like those of an update."""
        engine = self.engine.engine_config
        verl_internals.assign_non_tensor(
            data,
            use_remove_padding=self.model_config.get("use_remove_padding", False),
            use_dynamic_bsz=engine.use_dynamic_bsz,
            max_token_len_per_gpu=engine.max_token_len_per_gpu,
            micro_batch_size_per_gpu=engine.micro_batch_size_per_gpu,
        )
        with self.engine.eval_mode():
            return self.engine.log_probs(data)


class MethodWorker(verl_internals.ActorRolloutRefWorker):
    """Student, teachers and the weight sync to the rollout, in one process per device.

    verl looks for a base class of the name `Worker` among its ancestors, so this one must be called otherwise.
    """

    actor_worker_cls = ScoringTrainingWorker

    @verl_internals.register(dispatch_mode=verl_internals.Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        super().init_model()
        heartbeat.start("trainer worker")
        self.rollout.zmq_handle = own(self.rollout.zmq_handle)
        weight_sync.install(self.rollout)
        self._attach()

    def _attach(self) -> None:
        train = self.config.vopd.train
        self.actor.engine.attach(method.of(self.config.vopd), train.chunk, train.teachers_on_host)
        # Nothing of ours draws from these; a library that did would do so alike in every run of a seed.
        seed = self.config.vopd.seed + self.rank
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    @verl_internals.register(
        dispatch_mode=verl_internals.make_nd_compute_dataproto_dispatch_fn(mesh_name="actor")
    )
    def update_actor(self, data: TensorDict) -> TensorDict:
        engine = self.actor.engine
        engine.update_in_batch = 0
        data["rendered"] = NonTensorStack(*stored_views.of_rows(list(data["uid"])))
        if engine.method.needs_old_log_probs and self.config.vopd.train.updates_per_batch > 1:
            data["old_log_probs"] = self.actor.log_probs(data)
        return super().update_actor(data)

    @verl_internals.register(dispatch_mode=verl_internals.Dispatch.ONE_TO_ALL)
    def export(self, folder: str, dtype: str) -> None:
        """Write the student as a Hugging Face folder that transformers and vLLM load.

        Args:
            folder: created if missing.
            dtype: of the written weights, e.g. `bfloat16`.
        """
        engine = self.actor.engine
        target = getattr(torch, dtype)
        state: dict[str, torch.Tensor] = {}
        for name, tensor in engine.full_state():
            if self.rank == 0:
                state[name] = tensor.detach().to("cpu", target).contiguous().clone()
        if self.rank == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            if engine.model_config.hf_config.tie_word_embeddings:
                state.pop("lm_head.weight", None)
            save_torch_state_dict(state, folder)
            hf_config = engine.module.config
            hf_config.dtype = target
            hf_config.save_pretrained(folder)
            engine.module.generation_config.save_pretrained(folder)
            engine.model_config.processor.save_pretrained(folder)
        torch.distributed.barrier()
