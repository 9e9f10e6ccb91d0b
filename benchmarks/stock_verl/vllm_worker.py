"""vLLM's worker with the CPU's patches, and verl's own name for the socket of the weight sync."""

from __future__ import annotations

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from vopd.backbone.cpu.vllm_worker import CPUWorkerExtension


class Extension(CPUWorkerExtension):
    """Takes its weights from verl's sender; ours gives the socket a name of its run."""

    def _get_zmq_handle(self) -> str:
        return str(vLLMColocateWorkerExtension._get_zmq_handle(self))
