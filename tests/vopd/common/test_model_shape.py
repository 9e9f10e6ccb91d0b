"""Parameters counted from a config alone are those of transformers' own model, part by part."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from vopd.common import model_shape
from vopd.common.model_shape import ModelShape
from vopd.errors import UserError

BASE = Path(__file__).parents[3] / "data" / "miniature" / "base"
MINIATURE = json.loads((BASE / "config.json").read_text())
# What transformers' class describes as its 9B style: the true vocabulary and head, 32 layers.
WIDE = {
    "vocab_size": 248320, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}  # fmt: skip
TOWER = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "in_channels": 3, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 4096, "num_position_embeddings": 2304,
}  # fmt: skip
SMALL = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 24, "attention_bias": True, "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"] * 3,
}  # fmt: skip
EXPERTS = WIDE | {
    "num_hidden_layers": 8, "hidden_size": 2048, "moe_intermediate_size": 512, "num_experts": 256,
    "num_experts_per_tok": 8, "shared_expert_intermediate_size": 512,
}  # fmt: skip


def config(
    text: dict[str, Any], tied: bool, kind: str = "qwen3_5", tower: dict[str, Any] = TOWER
) -> dict[str, Any]:
    tower = tower | {"out_hidden_size": text["hidden_size"]}
    return {
        "model_type": kind,
        "tie_word_embeddings": tied,
        "text_config": text | {"tie_word_embeddings": tied},
        "vision_config": tower,
    }


CONFIGS = {
    "miniature, tied": MINIATURE,
    "wide, untied": config(WIDE, tied=False),
    "wide, tied": config(WIDE | {"hidden_size": 2560, "intermediate_size": 9216}, tied=True),
    "small, biased, odd kernel": config(SMALL, tied=False, tower=TOWER | {"depth": 2, "patch_size": 8}),
    "experts, untied": config(EXPERTS, tied=False, kind="qwen3_5_moe"),
}


def real(given: dict[str, Any]) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForImageTextToText

    values = {key: value for key, value in given.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(given["model_type"], **values))


def part(name: str) -> str:
    """The part of the estimate that a parameter of the real model belongs to."""
    for key, found in (
        ("visual.", "vision tower"), ("embed_tokens", "embedding"), ("lm_head", "head"),
        ("self_attn", "attention layers"), ("linear_attn", "GatedDeltaNet layers"), ("experts", "experts"),
        ("mlp.gate.", "experts"), ("shared_expert", "experts"), ("mlp.", "MLP"), ("norm", "norms"),
    ):  # fmt: skip
        if key in name:
            return found
    raise AssertionError(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_part_has_as_many_parameters_as_in_the_real_model(name: str) -> None:
    model, counted = real(CONFIGS[name]), Counter[str]()
    for parameter_name, parameter in model.named_parameters():
        counted[part(parameter_name)] += parameter.numel()
    found = model_shape.shape(CONFIGS[name])
    assert {key: value for key, value in found.parts.items() if value} == dict(counted)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.layers == len(model.model.language_model.layers)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.language_model.layers]
    assert found.largest_layer == max(layers)
    assert {sum(p.numel() for p in block.parameters()) for block in model.model.visual.blocks} == {
        found.vision.block
    }


def test_a_twin_that_unties_the_head_does_not_agree_with_the_real_model() -> None:
    model = real(MINIATURE)
    untied = model_shape.shape(MINIATURE | {"tie_word_embeddings": False})
    assert untied.parameters != sum(p.numel() for p in model.parameters())


def test_a_token_passes_through_the_chosen_experts_alone() -> None:
    found = model_shape.shape(CONFIGS["experts, untied"])
    everything = model_shape.shape(
        config(EXPERTS | {"num_experts_per_tok": 256}, tied=False, kind="qwen3_5_moe")
    )
    assert found.body < everything.body
    assert found.parameters == everything.parameters


def test_the_layers_follow_the_interval_where_they_are_not_listed() -> None:
    found = model_shape.shape(config(WIDE | {"full_attention_interval": 8}, tied=False))
    assert (found.attention_layers, found.delta_layers) == (4, 28)


def test_a_folder_with_config_json_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MINIATURE))
    found: ModelShape = model_shape.read(str(tmp_path))
    assert found == model_shape.shape(MINIATURE)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"text_config": WIDE | {"hidden_size": "wide"}}, "text_config.hidden_size"),
        ({"vision_config": {key: TOWER[key] for key in TOWER if key != "depth"}}, "vision_config.depth"),
        ({"text_config": WIDE | {"layer_types": ["full_attention"]}}, "layer_types"),
    ],
)
def test_what_cannot_be_counted_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        model_shape.shape(CONFIGS["wide, untied"] | change)
