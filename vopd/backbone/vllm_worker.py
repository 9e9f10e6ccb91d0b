"""What vLLM's workers need to serve as a rollout (`engine_kwargs.vllm.worker_extension_cls`).

The socket of the weight sync is this run's own (`weight_sockets.py`), and no port is opened to the network
(`vopd/common/loopback.py`). On a CPU more is needed: `cpu/vllm_worker.py`.
"""

from __future__ import annotations

from typing import Any

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from vopd.backbone.weight_sockets import own
from vopd.common import heartbeat, loopback


class WorkerExtension(vLLMColocateWorkerExtension, loopback.Worker):
    """verl's extension with a heartbeat, the loopback alone, and the run's own weight socket."""

    def __new__(cls, **kwargs: Any) -> WorkerExtension:
        """In the process that computes, before it builds its model."""
        heartbeat.start("vLLM engine")
        return super().__new__(cls, **kwargs)

    def _get_zmq_handle(self) -> str:
        return own(super()._get_zmq_handle())
