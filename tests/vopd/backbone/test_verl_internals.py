"""Contract with the pinned verl and vLLM: each name and signature that the backbone builds on.

A failure here after an upgrade names what changed; fix vopd/backbone/verl_internals.py or the override it points to.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from vopd.backbone import verl_internals
from vopd.backbone.cpu.vllm_worker import CPUWorkerExtension
from vopd.backbone.engine import ScoringEngine
from vopd.backbone.replay_buffer import GroupBuffer
from vopd.backbone.rollout import ViewRolloutManager, ViewRolloutWorker
from vopd.backbone.rollout_servers import CountingClient, ServerManager
from vopd.backbone.trainer import Trainer
from vopd.backbone.vllm_worker import WorkerExtension
from vopd.backbone.worker import MethodWorker, ScoringTrainingWorker
from vopd.config import ROOT, load

SEAM = (
    f"verl {version('verl')}: the backbone is written against {verl_internals.VERL_VERSION}; this differs: "
)

# (our class, verl's class, method, verl's arguments that ours must take, in verl's order)
OVERRIDES = [
    (
        ViewRolloutWorker,
        verl_internals.AgentLoopWorker,
        "_run_prompt",
        "self prompt sampling_params trajectory trace",
    ),
    (ViewRolloutManager, verl_internals.AgentLoopManagerTQ, "_init_agent_loop_workers", "self"),
    (Trainer, verl_internals.PPOTrainerSync, "__init__", "self config"),
    (Trainer, verl_internals.PPOTrainerSync, "_build_replay_buffer", "self"),
    (Trainer, verl_internals.PPOTrainerSync, "_init_resource_pool_mgr", "self"),
    (Trainer, verl_internals.PPOTrainerSync, "_next_train_batch", "self num_prompts"),
    (Trainer, verl_internals.PPOTrainerSync, "_add_prompts_to_generate", "self num_prompts"),
    (GroupBuffer, verl_internals.ReplayBuffer, "_clear_groups", "self partition_id uids"),
    (
        GroupBuffer,
        verl_internals.ReplayBuffer,
        "_select_prompt_uids",
        "self partition_id sampleable_keys batch_size",
    ),
    (
        GroupBuffer,
        verl_internals.ReplayBuffer,
        "_terminal_eviction_reasons",
        "self global_steps partition_id",
    ),
    (
        GroupBuffer,
        verl_internals.ReplayBuffer,
        "_sampleable_terminal_keys",
        "self partition_id eviction_reasons",
    ),
    (Trainer, verl_internals.PPOTrainerSync, "_step_once", "self metrics timing_raw sample_batch_size"),
    (Trainer, verl_internals.PPOTrainerSync, "_update_actor", "self batch metrics"),
    (Trainer, verl_internals.PPOTrainerSync, "_validate", "self"),
    (
        Trainer,
        verl_internals.PPOTrainerSync,
        "_compute_metrics",
        "self batch metrics timing_raw global_steps epoch",
    ),
    (Trainer, verl_internals.PPOTrainerSync, "_save_checkpoint", "self"),
    (Trainer, verl_internals.PPOTrainerSync, "_load_checkpoint", "self"),
    (Trainer, verl_internals.PPOTrainerSync, "fit", "self agent_loop_manager"),
    (ScoringEngine, verl_internals.FSDPEngineWithLMHead, "_build_module", "self"),
    (ScoringEngine, verl_internals.FSDPEngineWithLMHead, "_build_lr_scheduler", "self optimizer"),
    (ScoringEngine, verl_internals.FSDPEngineWithLMHead, "train_batch", "self data loss_function"),
    (
        ScoringEngine,
        verl_internals.FSDPEngineWithLMHead,
        "forward_step",
        "self micro_batch loss_function forward_only",
    ),
    (ScoringEngine, verl_internals.FSDPEngineWithLMHead, "save_checkpoint", "self local_path"),
    (ScoringEngine, verl_internals.FSDPEngineWithLMHead, "load_checkpoint", "self local_path"),
    (ScoringTrainingWorker, verl_internals.TrainingWorker, "__init__", "self config"),
    (CountingClient, verl_internals.LLMServerClient, "__init__", "self config load_balancer_handle"),
    (CountingClient, verl_internals.LLMServerClient, "_acquire_server", "self request_id"),
    (CountingClient, verl_internals.LLMServerClient, "_release_server", "self server_id request_id"),
    (ServerManager, verl_internals.LLMServerManager, "_init_global_load_balancer", "self"),
    (ServerManager, verl_internals.LLMServerManager, "get_client", "self client_cls"),
    (MethodWorker, verl_internals.ActorRolloutRefWorker, "init_model", "self"),
    (MethodWorker, verl_internals.ActorRolloutRefWorker, "update_actor", "self data"),
    (
        CPUWorkerExtension,
        WorkerExtension.__mro__[1],
        "update_weights_from_ipc",
        "self peft_config base_sync_done use_shm",
    ),
    (WorkerExtension, WorkerExtension.__mro__[1], "_get_zmq_handle", "self"),
]

# Called, not overridden: (owner, method, arguments by name that we rely on)
CALLED = [
    (verl_internals.AgentLoopWorker, "generate_sequences", "self batch"),
    (verl_internals.PPOTrainerSync, "_submit_batch_to_rollout", "self batch"),
    (verl_internals.ReplayBuffer, "sample", "self global_steps partition_id batch_size"),
    (verl_internals.PPOTrainerSync, "on_sample_end", "self"),
    (verl_internals.FSDPEngineWithLMHead, "prepare_model_inputs", "self micro_batch"),
    (verl_internals.FSDPEngineWithLMHead, "forward_backward_batch", "self data loss_function forward_only"),
    (verl_internals.FSDPEngineWithLMHead, "optimizer_step", "self"),
    (verl_internals.FSDPEngineWithLMHead, "optimizer_zero_grad", "self"),
    (verl_internals.FSDPEngineWithLMHead, "get_per_tensor_param", "self"),
    (verl_internals.FSDPEngineWithLMHead, "eval_mode", "self"),
    (verl_internals.FSDPEngineWithLMHead, "get_data_parallel_group", "self"),
]


def plain_function(owner: Any, name: str) -> Any:
    """The function behind verl's decorators."""
    return inspect.unwrap(inspect.getattr_static(owner, name))


def check_seam(owner: Any, name: str, arguments: str) -> None:
    where = f"{SEAM}{owner.__module__}.{owner.__qualname__}.{name}"
    assert hasattr(owner, name), f"{where} is gone"
    found = list(inspect.signature(plain_function(owner, name)).parameters)
    missing = [a for a in arguments.split() if a not in found]
    assert not missing, f"{where}{tuple(found)} has no {missing}"


def test_the_pin_is_the_version_that_was_read() -> None:
    assert version("verl") == verl_internals.VERL_VERSION
    assert version("transformers") == "5.9.0"
    assert version("torch").split("+")[0] == "2.11.0"


@pytest.mark.parametrize(("ours", "theirs", "name", "arguments"), OVERRIDES)
def test_what_we_override_exists_and_takes_what_we_take(
    ours: Any, theirs: Any, name: str, arguments: str
) -> None:
    assert issubclass(ours, theirs)
    assert name in vars(ours), f"{ours.__name__}.{name} is no longer ours: drop it from this list"
    check_seam(theirs, name, arguments)


@pytest.mark.parametrize(("owner", "name", "arguments"), CALLED)
def test_what_we_call_exists(owner: Any, name: str, arguments: str) -> None:
    check_seam(owner, name, arguments)


@pytest.mark.parametrize("defect", ["gone", "renamed argument"])
def test_a_seam_that_changed_is_seen(defect: str) -> None:
    class Changed(verl_internals.PPOTrainerSync):
        def _step_once(self, metrics: Any, timings: Any, sample_batch_size: int) -> None: ...

    name = "_step_twice" if defect == "gone" else "_step_once"
    with pytest.raises(AssertionError, match=r"verl 0\.9\.1.*_step"):
        check_seam(Changed, name, "self metrics timing_raw sample_batch_size")


def test_every_name_that_seams_exports_is_there() -> None:
    assert [name for name in verl_internals.__all__ if not hasattr(verl_internals, name)] == []


def test_the_engine_has_what_the_scoring_engine_reads() -> None:
    source = inspect.getsource(verl_internals.FSDPEngineWithLMHead.__mro__[1])
    for name in (
        "_autocast_dtype",
        "self.optimizer_config",
        "self.rank",
        "self.optimizer =",
        "batch_num_tokens",
    ):
        assert name in source, f"{SEAM}FSDPEngine no longer has {name}"


def test_workers_are_found_by_their_class_attributes() -> None:
    assert hasattr(verl_internals.ActorRolloutRefWorker, "actor_worker_cls")
    assert MethodWorker.actor_worker_cls is ScoringTrainingWorker


def test_the_trainer_is_registered_under_its_name() -> None:
    trainers = importlib.import_module("verl.trainer.ppo.v1.trainer_base")
    assert trainers.get_trainer_cls("vopd") is Trainer


def test_the_trainer_starts_servers_through_the_name_that_we_replace() -> None:
    source = inspect.getsource(verl_internals.PPOTrainerSync.__mro__[1])
    assert "LLMServerManager.create(" in source and "self.llm_server_manager.get_client()" in source, SEAM


def test_the_trainer_waits_in_the_buffer_of_the_name_that_we_replace() -> None:
    source = inspect.getsource(verl_internals.PPOTrainerSync.__mro__[1]._build_replay_buffer)
    assert "ReplayBuffer if self.trainer_mode" in source and "if sampler_cls is ReplayBuffer" in source, SEAM
    assert "refill_fn=self._add_prompts_to_generate" in source, SEAM
    assert "_dapo_classification_cache" in inspect.getsource(
        verl_internals.ReplayBuffer._dapo_filtered_keys
    ), SEAM
    sample = inspect.getsource(verl_internals.ReplayBuffer.sample)
    assert (
        "self._clear_groups(partition_id, surplus_uids)" in sample and "self._select_prompt_uids(" in sample
    ), SEAM


def test_both_caches_of_images_are_dropped_when_weights_arrive() -> None:
    """The rollouts of a prompt share one encoding of its image; one by the weights of before would be wrong."""
    rollout = importlib.import_module("verl.workers.rollout.vllm_rollout.vllm_rollout")
    server = importlib.import_module("verl.workers.rollout.vllm_rollout.vllm_async_server")
    assert "clear_kv_cache.remote()" in inspect.getsource(rollout.ServerAdapter.update_weights), SEAM
    source = inspect.getsource(server.vLLMHttpServer.clear_kv_cache)
    assert "reset_mm_cache()" in source and "reset_encoder_cache()" in source, SEAM


def test_the_rollout_bans_vision_placeholders() -> None:
    server = importlib.import_module("verl.workers.rollout.vllm_rollout.vllm_async_server")
    assert '"banned_token_ids": get_vision_placeholder_token_ids' in inspect.getsource(server), SEAM


def test_vllms_cpu_runner_still_leaves_blocks_dirty() -> None:
    """When vLLM clears them itself, vopd.backbone.vllm_worker can go."""
    runner = pytest.importorskip("vllm.v1.worker.cpu_model_runner", reason="vLLM's CPU build only")
    body = inspect.getsource(runner.CPUModelRunner._zero_block_ids)
    assert body.strip().endswith("pass"), "CPUModelRunner._zero_block_ids does something now"


def test_vllms_runner_has_what_the_extension_touches() -> None:
    runner = importlib.import_module("vllm.v1.worker.gpu_model_runner")
    source = inspect.getsource(runner)
    for name in ("self.kv_caches", "self.kv_cache_config", "_zero_block_ids"):
        assert name in source, f"vLLM {version('vllm')}: GPUModelRunner no longer has {name}"
    check_seam(runner.GPUModelRunner, "reload_weights", "self weights_iterator is_checkpoint_format")


# ---- verl's configuration tree -------------------------------------------------------------------------------------

# Keys that verl's YAML tree does not list: ours, free-form dictionaries, and fields that only its dataclasses have.
ADDED = (
    "vopd",
    "actor_rollout_ref.vopd",
    "actor_rollout_ref.rollout.engine_kwargs",
    "actor_rollout_ref.model.override_config",
    "actor_rollout_ref.actor.fsdp_config.mixed_precision",
    "actor_rollout_ref.actor.optim.override_optimizer_config",
    "ray_kwargs.ray_init",
)
FIELDS = {
    "actor_rollout_ref.rollout": "RolloutConfig",
    "actor_rollout_ref.rollout.agent": "AgentLoopConfig",
}


def is_field(key: str) -> bool:
    parent, _, name = key.rpartition(".")
    config = importlib.import_module("verl.workers.config.rollout")
    return parent in FIELDS and name in {f.name for f in fields(getattr(config, FIELDS[parent]))}


def leaves(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict) or not node:
        return [prefix]
    return [
        leaf for key, value in node.items() for leaf in leaves(value, f"{prefix}.{key}" if prefix else key)
    ]


def check_mapping_knows_verls_keys(mapping: dict[str, Any]) -> None:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    folder = Path(importlib.import_module("verl").__file__).parent / "trainer" / "config"
    with initialize_config_dir(version_base=None, config_dir=str(folder)):
        tree = compose("ppo_trainer")
    absent = object()
    unknown = [
        key
        for key in leaves(mapping)
        if not key.startswith(ADDED)
        and not is_field(key)
        and OmegaConf.select(tree, key, default=absent) is absent
    ]
    assert unknown == [], f"{SEAM}verl's configuration has no {unknown}"


@pytest.mark.parametrize("file", ["verl.yaml", "verl_cpu.yaml", "verl_cuda.yaml"])
def test_every_key_we_set_exists_in_verls_tree(file: str) -> None:
    path = Path(inspect.getfile(verl_internals)).parent / file
    check_mapping_knows_verls_keys(OmegaConf.to_container(OmegaConf.load(path), resolve=False))


def test_settings_twin_a_mistyped_key_of_verl_is_seen() -> None:
    with pytest.raises(AssertionError, match="ppo_mini_bacth_size"):
        check_mapping_knows_verls_keys({"actor_rollout_ref": {"actor": {"ppo_mini_bacth_size": 4}}})


def test_an_unknown_verl_override_is_an_error() -> None:
    from vopd.backbone.verl_config import verl_config
    from vopd.errors import UserError

    assert (
        verl_config(load("vision_opd", ["+verl.trainer.balance_batch=false"])).trainer.balance_batch is False
    )
    with pytest.raises(UserError, match="balance_bacth"):
        verl_config(load("vision_opd", ["+verl.trainer.balance_bacth=false"]))


def test_cpu_rollout_never_cuts_a_seeded_prompt() -> None:
    """vLLM 0.24 rewinds a request's generator when its prompt is prefilled in parts; a CPU generator has no offset."""
    with pytest.raises(RuntimeError, match="offset"):
        torch.Generator().get_offset()
    settings = OmegaConf.load(ROOT / "vopd/backbone/verl_cpu.yaml").actor_rollout_ref.rollout
    assert settings.enable_chunked_prefill is False
