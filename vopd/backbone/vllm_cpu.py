"""What vLLM's CPU build needs to serve as a rollout (`engine_kwargs.vllm.worker_extension_cls`).

1. Its linear layers pack their weights for oneDNN after loading and drop the plain tensors, so verl's in-place
   `load_weights` finds none; vLLM's own `reload_weights` restores load-time parameters first.
2. Attention and GatedDeltaNet layers share cache blocks. On GPU vLLM clears a block before it is used again;
   `CPUModelRunner._zero_block_ids` is empty in 0.24, so stale states turn into NaN log-probs, without a message,
   from the second batch on.
"""

from __future__ import annotations

from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension


def zero_blocks(caches: list[Any], num_blocks: int, block_ids: list[int]) -> None:
    """Clear the given blocks in every attention cache; a cache may split a block into several slots."""
    index = torch.tensor(block_ids)
    for cache in caches:
        if isinstance(cache, torch.Tensor):  # GatedDeltaNet layers hold a list of states in the same memory
            slots = cache.shape[0] // num_blocks
            cache.view(-1, slots, *cache.shape[1:])[index] = 0


class CPUWorkerExtension(vLLMColocateWorkerExtension):
    """See the module's docstring."""

    def monkey_patch_model(self, vocab_size: int, banned_token_ids: list[int] | None = None) -> None:
        super().monkey_patch_model(vocab_size, banned_token_ids)
        runner = self.model_runner
        runner._zero_block_ids = lambda ids: zero_blocks(
            runner.kv_caches, runner.kv_cache_config.num_blocks, ids
        )

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
