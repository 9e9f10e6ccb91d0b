"""What vLLM's workers need on a CPU (`worker_extension_cls`), in training and behind `vllm serve` alike.

vLLM does not clear cache blocks before they are used again (`vllm_blocks.py`), and its GatedDeltaNet layers know bf16
alone (`vllm_delta_rule.py`).
"""

from __future__ import annotations

from typing import Any

from vopd.backbone.cpu import vllm_blocks, vllm_delta_rule
from vopd.common import loopback


def install() -> None:
    """In the process that computes, before it builds its model."""
    vllm_delta_rule.install()
    vllm_blocks.install()


class ServingWorker(loopback.Worker):
    """Of a `vllm serve`."""

    def __new__(cls, **_kwargs: Any) -> ServingWorker:
        """See `install`."""
        install()
        return super().__new__(cls)
