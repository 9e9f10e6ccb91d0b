"""What vLLM's workers need to serve as a rollout (`engine_kwargs.vllm.worker_extension_cls`).

On every device the socket of the weight sync is this run's own (`sockets.py`), and no port is opened to the network
(`vopd/common/loopback.py`). On CPU:

1. vLLM's linear layers pack their weights for oneDNN after loading and drop the plain tensors, so verl's in-place
   `load_weights` finds none; vLLM's own `reload_weights` restores load-time parameters first.
2. It does not clear cache blocks before they are used again (`vopd/backbone/cpu/vllm_blocks.py`).
3. Its GatedDeltaNet layers know bf16 alone (`vopd/backbone/cpu/vllm_delta_rule.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from vopd.backbone.cpu import vllm_delta_rule
from vopd.backbone.cpu.vllm_blocks import clear_used_blocks
from vopd.backbone.weight_sockets import own
from vopd.common import heartbeat, loopback


class WorkerExtension(vLLMColocateWorkerExtension, loopback.Worker):
    """See the module's docstring."""

    def __new__(cls, **kwargs: Any) -> WorkerExtension:
        """In the process that computes, before it builds its model."""
        heartbeat.start("vLLM engine")
        return super().__new__(cls, **kwargs)

    def _get_zmq_handle(self) -> str:
        return own(super()._get_zmq_handle())


class CPUWorkerExtension(WorkerExtension):
    """See the module's docstring."""

    def __new__(cls, **kwargs: Any) -> CPUWorkerExtension:
        """Before the worker builds its model."""
        vllm_delta_rule.install()
        return super().__new__(cls, **kwargs)

    def monkey_patch_model(self, vocab_size: int, banned_token_ids: list[int] | None = None) -> None:
        super().monkey_patch_model(vocab_size, banned_token_ids)
        clear_used_blocks(self.model_runner)

    def update_weights_from_ipc(
        self, peft_config: dict[str, Any] | None = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> None:
        if peft_config:
            raise NotImplementedError("LoRA weights cannot be sent to the CPU rollout; train full weights.")
        weights: list[tuple[str, torch.Tensor]] = []
        receiver = BucketedWeightReceiver(self._get_zmq_handle(), self.device, use_shm)
        # The received tensors are views of a shared-memory bucket that is reused: keep copies.
        receiver.receive_weights(lambda bucket, is_last: weights.extend((n, t.clone()) for n, t in bucket))
        self.reload_weights(weights_iterator=iter(weights), is_checkpoint_format=True)
