"""Clear vLLM's cache blocks before they are used again, on CPU: for the rollout and for evaluation alike.

Attention and GatedDeltaNet layers share cache blocks. On GPU vLLM clears a block before it is used again;
`CPUModelRunner._zero_block_ids` is empty in 0.24, so stale states turn into NaN log-probs, without a message, from
the second batch on.
"""

from __future__ import annotations

from typing import Any

import torch


def zero_blocks(caches: list[Any], num_blocks: int, block_ids: list[int]) -> None:
    """Clear the given blocks in every attention cache; a cache may split a block into several slots."""
    index = torch.tensor(block_ids)
    for cache in caches:
        if isinstance(cache, torch.Tensor):  # GatedDeltaNet layers hold a list of states in the same memory
            slots = cache.shape[0] // num_blocks
            cache.view(-1, slots, *cache.shape[1:])[index] = 0


def install() -> None:
    """Give vLLM's model runner on CPU the clearing of blocks that it lacks."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def _zero_block_ids(self: Any, ids: list[int]) -> None:
        zero_blocks(self.kv_caches, self.kv_cache_config.num_blocks, ids)

    CPUModelRunner._zero_block_ids = _zero_block_ids
