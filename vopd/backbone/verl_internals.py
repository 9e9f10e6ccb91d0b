"""Every name of verl 0.9.1 that is not a documented plug-in point, in one place.

The rest of the backbone takes these from here; `test_verl_internals.py` checks each against the installed version, so
that an upgrade fails there with the name and not in the middle of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transfer_queue
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.trainer.main_ppo import TaskRunnerV1
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.device import get_device_id, get_device_name
from verl.utils.distributed import initialize_global_process_group_ray
from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions
from verl.utils.tensordict_utils import assign_non_tensor, get_tensordict, list_of_dict_to_tensordict
from verl.utils.tensordict_utils import nested_tensor_from_tensor_list as _nested_from_list
from verl.utils.tokenizer import hf_processor, hf_tokenizer
from verl.utils.tracking import Tracking
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine.utils import prepare_micro_batches
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.rollout.llm_server import LLMServerClient, LLMServerManager

VERL_VERSION = "0.9.1"
ROLLOUT_SERVER_MODULE = "verl.workers.rollout.vllm_rollout.vllm_async_server"

__all__ = [
    "ROLLOUT_SERVER_MODULE",
    "VERL_VERSION",
    "ActorRolloutRefWorker",
    "AgentLoopManagerTQ",
    "AgentLoopMetrics",
    "AgentLoopOutput",
    "AgentLoopWorker",
    "Dispatch",
    "FSDPEngineWithLMHead",
    "FSDPModule",
    "LLMServerClient",
    "LLMServerManager",
    "PPOTrainerSync",
    "ReplayBuffer",
    "Role",
    "TaskRunner",
    "Tracking",
    "TrainingWorker",
    "assign_non_tensor",
    "before_queue_closes",
    "full_tensor",
    "get_device_id",
    "get_device_name",
    "get_seqlen_balanced_partitions",
    "get_tensordict",
    "hf_processor",
    "hf_tokenizer",
    "initialize_global_process_group_ray",
    "list_of_dict_to_tensordict",
    "make_nd_compute_dataproto_dispatch_fn",
    "nested_positions",
    "prepare_micro_batches",
    "register",
    "register_engine",
    "register_trainer",
    "use_replay_buffer",
    "use_server_manager",
    "use_tracking",
    "verdicts_of_groups",
]

# Both classes are already Ray actors in verl; subclassing needs the plain class behind them.
AgentLoopWorker = AgentLoopWorkerTQ.__ray_metadata__.modified_class
TaskRunner = TaskRunnerV1.__ray_metadata__.modified_class


def register_engine(engine: type[FSDPEngineWithLMHead]) -> None:
    """Make `engine` the language-model engine of strategy fsdp2 on this device.

    verl's decorator refuses a second registration for the same device (cuda has one), hence the table itself.
    """
    EngineRegistry._engines.setdefault("language_model", {}).setdefault("fsdp2", {})[get_device_name()] = (
        engine
    )


def before_queue_closes(call: Callable[[], None]) -> None:
    """Have `call` made when verl's task runner is about to end its processes, whether all went well or not."""
    close = transfer_queue.close

    def closing() -> None:
        call()
        close()

    transfer_queue.close = closing


def use_server_manager(manager: type[LLMServerManager]) -> None:
    """Make verl's trainers start their rollout servers through `manager`; they name the class and take no other."""
    trainer_base.LLMServerManager = manager


def use_replay_buffer(buffer: type[ReplayBuffer]) -> None:
    """Make verl's synchronous trainer wait in `buffer`; a custom sampler would go without group filtering."""
    trainer_base.ReplayBuffer = buffer


def use_tracking(make: Callable[..., Any]) -> None:
    """Make verl's trainers write to what `make` returns, called as the class that they name."""
    trainer_base.Tracking = make


def verdicts_of_groups(buffer: ReplayBuffer, partition_id: str) -> dict[str, float | None]:
    """Prompt key -> the metric that all its rollouts share, None where they differ; finished groups alone."""
    return buffer._dapo_classification_cache[partition_id]


def nested_positions(rows_4L: list[torch.Tensor]) -> torch.Tensor:
    """A jagged (B, 4, L) tensor that is ragged in L even when all rows are equally long (verl#7899)."""
    return _nested_from_list(rows_4L, ragged_idx=2)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor on every rank (a collective); a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain(value: Any) -> Any:
    """A non-tensor value as it was put in."""
    return getattr(value, "data", value)
