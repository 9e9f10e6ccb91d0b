"""The estimate's formulas against what the code keeps: a layer's activations, a checkpoint's files, a rank's share."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vopd import method as contract
from vopd.backbone import delta_rule, shards
from vopd.common import model_shape
from vopd.common.model_shape import ModelShape
from vopd.config import load
from vopd.runner import estimate as module
from vopd.runner.estimate import Estimate, Figure, estimate, total

BASE = Path(__file__).parents[3] / "data" / "miniature" / "base"
MINIATURE = json.loads((BASE / "config.json").read_text())
SHAPE = model_shape.shape(MINIATURE)
TOKENS = 600  # 15 whole chunks of the delta rule

WIDTHS: tuple[dict[str, Any], ...] = (
    {},
    {"hidden_size": 384, "intermediate_size": 320},
    {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 96},
    {"linear_num_value_heads": 8, "linear_key_head_dim": 48, "linear_value_head_dim": 80},
)


def of(*words: str, recipe: str = "vision_opd", shape: ModelShape = SHAPE) -> Estimate:
    config = load(recipe, list(words))
    return estimate(config, contract.of(config), shape)


def named(figures: tuple[Figure, ...], part: str) -> Figure:
    return next(figure for figure in figures if part in figure.name)


# ---- what a layer keeps for its backward -----------------------------------------------------------------------------


def kept(run: Callable[[], Any], model: torch.nn.Module) -> int:
    """Bytes that autograd keeps while `run` goes forward, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _output = run()
    return sum(t.untyped_storage().nbytes() for place, t in found.items() if place not in weights)


def real(text: dict[str, Any], dtype: torch.dtype) -> tuple[Any, ModelShape]:
    """transformers' model with our delta rule, and its shape."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(BASE)
    for key, value in text.items():
        setattr(config.text_config, key, value)
    config.vision_config.out_hidden_size = config.text_config.hidden_size
    rotary = config.text_config.head_dim // 8
    config.text_config.rope_parameters["mrope_section"] = [
        rotary - 2 * (rotary // 4),
        rotary // 4,
        rotary // 4,
    ]
    config._attn_implementation = "sdpa"
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    delta_rule.install(model)
    for layer in model.model.language_model.layers[:-1]:
        rule = layer.linear_attn.chunk_gated_delta_rule
        layer.linear_attn.chunk_gated_delta_rule = lambda *a, rule=rule, cu_seqlens=None, **k: rule(*a, **k)
    return model, model_shape.shape(config.to_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", WIDTHS)
def test_a_layer_keeps_as_many_bytes_a_token_as_the_formulas_say(
    text: dict[str, Any], dtype: torch.dtype
) -> None:
    model, shape = real(text, dtype)
    language = model.model.language_model
    x = torch.randn(1, TOKENS, shape.hidden, dtype=dtype, requires_grad=True)
    rotary = language.rotary_emb(x, torch.arange(TOKENS)[None, None].expand(3, 1, TOKENS))
    for layer, formula in (
        (language.layers[-1], module.attention_bytes),
        (language.layers[0], module.delta_bytes),
    ):
        found = kept(lambda layer=layer: layer(x, position_embeddings=rotary), model) / TOKENS
        assert formula(shape, dtype.itemsize) == pytest.approx(found, rel=0.03)
        wider = replace(shape, feed_forward=replace(shape.feed_forward, width=2 * shape.feed_forward.width))
        assert formula(wider, dtype.itemsize) != pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tower_keeps_as_many_bytes_a_patch_as_the_formulas_say(dtype: torch.dtype) -> None:
    model, shape = real({}, dtype)
    pixels = torch.randn(256, shape.vision.patch_values, dtype=dtype)
    found = kept(lambda: model.model.visual(pixels, grid_thw=torch.tensor([[1, 16, 16]])), model) / 256
    blocks = shape.vision.depth * module.vision_bytes(shape, dtype.itemsize)
    assert blocks + module.vision_ends_bytes(shape, dtype.itemsize) == pytest.approx(found, rel=0.05)


# ---- what a rank holds -----------------------------------------------------------------------------------------------


def test_a_rank_holds_its_share_of_weights_momenta_and_every_teacher() -> None:
    one, two = of("train.prompts=32"), of("hardware.devices_per_node=2")
    assert total(one.resident) == 16 * SHAPE.parameters  # 4 weights, 8 momenta, 4 the moving average
    assert total(two.resident) == total(one.resident) / 2


@pytest.mark.parametrize(
    ("recipe", "words", "held", "heads"),
    [
        ("grpo", (), 0, 0),
        ("vision_opd", (), 1, 1),
        ("vision_opd", ("method.teacher=current",), 0, 1),
        ("vision_opd", ("method.teacher=trust_region",), 1, 2),
    ],
)
def test_teachers_are_counted_as_the_engine_keeps_them(
    recipe: str, words: tuple[str, ...], held: int, heads: int
) -> None:
    found = of(*words, recipe=recipe)
    assert sum(figure.name.startswith("teacher ") for figure in found.resident) == held
    gathered = sum(figure.value for figure in found.update if figure.name == "teachers' head weights")
    assert gathered == heads * SHAPE.embedding * 4


def test_checkpointing_keeps_a_layers_input_and_chunks_bound_the_logits() -> None:
    with_all, few = of(), of("train.gradient_checkpointing=true")
    assert named(few.update, "activations").value < named(with_all.update, "activations").value / 5
    wide = replace(SHAPE, vocabulary=10_000_000)
    large, small = of("train.chunk=1024", shape=wide), of("train.chunk=256", shape=wide)
    apart = named(large.update, "head: ").value - named(small.update, "head: ").value
    assert apart == 3 * 768 * 10_000_000 * 4


def test_more_tokens_a_micro_batch_cost_more_and_packed_rows_repeat_their_prompt() -> None:
    small, large = (
        named(of(f"train.max_tokens_per_micro_batch={n}").update, "activations") for n in (800, 3200)
    )
    assert large.value == 4 * small.value
    packed = named(of("train.max_tokens_per_micro_batch=800", "train.packed=true").update, "activations")
    assert packed.value == small.value * 800 / (160 + 4 * 40)


# ---- the disk, and time ----------------------------------------------------------------------------------------------


def test_a_checkpoint_is_as_large_as_the_files_that_are_written(tmp_path: Path) -> None:
    model = torch.nn.Linear(300, 200, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    teachers = {"ema:0.05": {"weight": model.weight.detach()}}
    shards.save(tmp_path, 0, 1, shards.State(model, optimizer, schedule, teachers))
    written = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    checkpoints = named(of().disk, "checkpoints").value
    assert checkpoints / (2 * SHAPE.parameters) == pytest.approx(written / 60_000, rel=0.02)
    assert named(of("train.keep=3").disk, "checkpoints").value == 2 * checkpoints


def test_seconds_are_of_a_card_and_its_number() -> None:
    gpu = ("profile=qwen3_5_4b_8gpu",)
    assert of().seconds == ()
    eight, sixteen = of(*gpu), of(*gpu, "hardware.nodes=2")
    assert named(sixteen.seconds, "student").value == pytest.approx(named(eight.seconds, "student").value / 2)
    assert total(of(*gpu, recipe="grpo").seconds) < total(eight.seconds)
    assert all("assumed" in figure.formula for figure in eight.seconds)
