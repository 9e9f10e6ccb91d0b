"""The rollout's vLLM: cleared cache blocks, masked vision tokens, as many image tokens as the trainer counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from vopd.backbone import weight_sockets
from vopd.backbone.cpu import vllm_blocks
from vopd.backbone.cpu.vllm_blocks import zero_blocks
from vopd.backbone.cpu.vllm_worker import CPUWorkerExtension
from vopd.backbone.rendering import render
from vopd.views import VIEWS

IMAGE, VIDEO = 5, 6


@pytest.fixture(scope="module")
def processor(engine_case: ModuleType) -> Any:
    from verl.utils.tokenizer import hf_processor

    return hf_processor(str(engine_case.BASE))


# ---- cache blocks --------------------------------------------------------------------------------------------------


def test_blocks_are_cleared_in_every_attention_cache() -> None:
    one, split = torch.ones(4, 2, 3), torch.ones(8, 5)  # the second keeps a block in two slots
    state = [torch.ones(4, 2)]
    zero_blocks([one, state, split], 4, [1, 3])
    assert one.sum(dim=(1, 2)).tolist() == [6, 0, 6, 0]
    assert split.sum(dim=1).tolist() == [5, 5, 0, 0, 5, 5, 0, 0]
    assert state[0].sum() == 8


# ---- vision tokens are never sampled -------------------------------------------------------------------------------


class Model:
    """Logits that want an image token above all."""

    model = torch.nn.Identity()  # verl looks inside for mixtures of experts

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(hidden), 10)
        logits[:, IMAGE], logits[:, VIDEO] = 50.0, 40.0
        return logits


def extension(model: Model) -> CPUWorkerExtension:
    made = object.__new__(CPUWorkerExtension)
    made.model_runner = SimpleNamespace(model=model)
    made._iter_all_models = lambda: [model]
    return made


def check_vision_tokens_masked(processor: Any) -> None:
    from verl.workers.rollout.utils import get_vision_placeholder_token_ids

    banned = get_vision_placeholder_token_ids(processor)
    assert sorted(banned) == [IMAGE, VIDEO]
    model = Model()
    extension(model).monkey_patch_model(10, banned)
    probs_BV = model.compute_logits(torch.zeros(2, 4)).softmax(-1)
    assert probs_BV[:, [IMAGE, VIDEO]].sum() == 0
    assert torch.isfinite(probs_BV).all()


def test_vision_tokens_are_masked_in_the_rollout(processor: Any) -> None:
    check_vision_tokens_masked(processor)


def test_vision_tokens_twin_an_extension_that_drops_the_mask_is_seen(
    processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CPUWorkerExtension, "monkey_patch_model", lambda self, *_: None)
    with pytest.raises(AssertionError):
        check_vision_tokens_masked(processor)


def test_the_patch_clears_blocks_of_every_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    monkeypatch.setattr(CPUModelRunner, "_zero_block_ids", CPUModelRunner._zero_block_ids)
    vllm_blocks.install()
    runner = object.__new__(CPUModelRunner)
    runner.kv_caches, runner.kv_cache_config = [torch.ones(2, 3)], SimpleNamespace(num_blocks=2)
    runner._zero_block_ids([1])
    assert runner.kv_caches[0].sum(dim=1).tolist() == [3, 0]


def test_lora_weights_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="train full weights"):
        extension(Model()).update_weights_from_ipc(peft_config={"r": 8})


# ---- image tokens --------------------------------------------------------------------------------------------------

COUNT = """
import json, sys
import engine_case
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing.context import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs
model, prompts, options = json.loads(sys.argv[1])
config = ModelConfig(model=model, tokenizer=model, max_model_len=512, mm_processor_cache_gb=0)
processor = MULTIMODAL_REGISTRY.create_processor(config)
out = []
for row, ids in zip(engine_case.make_rows(), prompts):
    items = processor.info.parse_mm_data({"image": [row["image"]]})
    made = processor.apply(ProcessorInputs(ids, items, None, options), TimingContext(enabled=False))
    out.append(made["prompt_token_ids"])
print("RESULT" + json.dumps(out))
"""


def vllm_prompts(
    engine_case: ModuleType, prompts: list[list[int]], options: dict[str, int]
) -> list[list[int]]:
    """Prompt ids after vLLM's own processor has put the images in; in a process of its own."""
    arguments = json.dumps([str(engine_case.BASE), prompts, options])
    environment = os.environ | {"PYTHONPATH": str(Path(engine_case.__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", COUNT, arguments], env=environment, capture_output=True, text=True, check=False
    )
    if "RESULT" not in done.stdout:  # not an assertion: a broken process is not what the twin looks for
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.split("RESULT", 1)[1].splitlines()[0])


def check_vllm_sees_the_trainers_prompt(
    processor: Any, engine_case: ModuleType, options: dict[str, int]
) -> None:
    from verl.workers.rollout.utils import qwen2_5_vl_dedup_image_tokens

    ours = [
        render(processor, VIEWS["full"](row), row["id"], 4096, {}).prompt_ids_P.tolist()
        for row in engine_case.make_rows()
    ]
    sent = [qwen2_5_vl_dedup_image_tokens(ids, processor) for ids in ours]
    assert all(ids.count(IMAGE) == 1 for ids in sent)
    assert vllm_prompts(engine_case, sent, options) == ours


@pytest.mark.distributed
def test_vllm_expands_the_prompt_to_the_ids_that_are_trained(processor: Any, engine_case: ModuleType) -> None:
    check_vllm_sees_the_trainers_prompt(processor, engine_case, {})


@pytest.mark.distributed
def test_pixels_twin_other_pixel_bounds_in_vllm_are_seen(processor: Any, engine_case: ModuleType) -> None:
    with pytest.raises(AssertionError, match="assert"):
        check_vllm_sees_the_trainers_prompt(processor, engine_case, {"min_pixels": 1024, "max_pixels": 2048})


def test_two_runs_on_one_machine_sync_over_sockets_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's name: Ray's job id, which two Rays share, replica and rank. Trainer and vLLM agree within a run."""
    monkeypatch.setenv("VERL_RAY_JOB_ID", "01000000")
    made = extension(Model())
    made.local_rank = 0
    trainers = "ipc:///tmp/rl-colocate-zmq-01000000-replica-0-rank-0.sock"
    seen = set()
    for _ in range(2):
        monkeypatch.setenv(weight_sockets.VARIABLE, weight_sockets.token())
        assert made._get_zmq_handle() == weight_sockets.own(trainers)
        seen.add(made._get_zmq_handle())
    assert len(seen) == 2


def test_a_process_without_its_runs_token_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(weight_sockets.VARIABLE, raising=False)
    with pytest.raises(KeyError, match=weight_sockets.VARIABLE):
        weight_sockets.own("ipc:///tmp/x.sock")
