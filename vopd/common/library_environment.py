"""Variables that verl, Ray and vLLM read when they are imported: for a run's processes and for a started server."""

from __future__ import annotations

COMMON = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    # Ray runs its workers at niceness 15, behind everything else on a shared machine.
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARN",
    "TOKENIZERS_PARALLELISM": "false",
    "TQ_NUM_THREADS": "1",
}
CPU = {
    "VERL_PLATFORM": "cpu",
    "OMP_NUM_THREADS": "1",
    # The trainer uses more (worker.py). Threads that spin while they wait take the cores from everything else; threads
    # that sleep at once are woken for each of thousands of short operations: many small solves took 28 ms, not 2.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "1000",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}


def variables(device: str) -> dict[str, str]:
    """The variables for `cpu` or another device."""
    return COMMON | (CPU if device == "cpu" else {})
