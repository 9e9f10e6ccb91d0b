"""The worker of a training's rollout on a CPU: the patches, and weights that are loaded as from a checkpoint.

vLLM's linear layers pack their weights for oneDNN after loading and drop the plain tensors, so verl's in-place
`load_weights` finds none; vLLM's own `reload_weights` restores load-time parameters first.
"""

from __future__ import annotations

from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver

from vopd.backbone.cpu import patches
from vopd.backbone.vllm_worker import WorkerExtension


class CPUWorkerExtension(WorkerExtension):
    """Installs the CPU patches, and loads weights as from a checkpoint."""

    def __new__(cls, **kwargs: Any) -> CPUWorkerExtension:
        """Before the worker builds its model."""
        patches.install()
        return super().__new__(cls, **kwargs)

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
