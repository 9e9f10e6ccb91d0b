"""Settings every test shares: one thread a process, no network, no telemetry, the same random examples each run."""

import os

# Read by libraries when they are first imported, and inherited by the processes tests start.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    WANDB_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
)

from hypothesis import settings

settings.register_profile("repository", derandomize=True, deadline=None)
settings.load_profile("repository")
