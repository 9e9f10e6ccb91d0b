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


def clear_used_blocks(runner: Any) -> None:
    """Give a vLLM CPU model runner the clearing of blocks that it lacks."""
    runner._zero_block_ids = lambda ids: zero_blocks(runner.kv_caches, runner.kv_cache_config.num_blocks, ids)
