"""What verl's trainer worker lacks on a CPU (`actor_rollout_ref.model.external_lib`, imported before its model).

verl would open its process group with the backend `cpu:gloo,cpu:gloo`, which torch refuses, and leaves it alone where
there is one. Threads and delta rule are those of our worker (`vopd/backbone/worker.py`, `delta_rule.py`), so that
their gain is no part of a comparison.
"""

from __future__ import annotations

import os

if "WORLD_SIZE" in os.environ:  # a rank of the trainer; others that read the model's settings need nothing
    import torch
    from transformers.models.qwen3_5 import modeling_qwen3_5
    from verl.utils.distributed import initialize_global_process_group_ray

    from vopd.backbone import delta_rule

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["WORLD_SIZE"])))
    initialize_global_process_group_ray(backend="cpu:gloo")
    modeling_qwen3_5.torch_chunk_gated_delta_rule = delta_rule._as_called_by_the_layer
