"""The shape of a Qwen3.5 model, read from its config.json without torch: parameters and widths of each part.

Counts are those of transformers' classes (a test holds them to the real ones on torch's meta device). Parameters of the
multi-token prediction that some checkpoints carry are not loaded by transformers and not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from vopd.common import model_config
from vopd.errors import UserError

KNOWN = ("qwen3_5", "qwen3_5_moe")
TEXT, VISION = "text_config", "vision_config"


@dataclass(frozen=True)
class Attention:
    """A layer of softmax attention with a gated output."""

    heads: int
    key_value_heads: int
    head_dim: int
    bias: bool

    @property
    def width(self) -> int:
        """Numbers a token's queries of all heads have."""
        return self.heads * self.head_dim

    def parameters(self, hidden: int) -> int:
        """Queries with their gate, keys, values, output, and the norms of queries and keys."""
        key_value = self.key_value_heads * self.head_dim
        bias = (2 * self.width + 2 * key_value + hidden) * self.bias
        return hidden * (2 * self.width + 2 * key_value + self.width) + 2 * self.head_dim + bias


@dataclass(frozen=True)
class DeltaNet:
    """A GatedDeltaNet layer."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    @property
    def keys(self) -> int:
        """Numbers a token's keys of all heads have."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Numbers a token's values of all heads have."""
        return self.value_heads * self.value_dim

    @property
    def state(self) -> int:
        """Numbers of the recurrent state and of the convolution's last inputs, per sequence."""
        return self.value_heads * self.key_dim * self.value_dim + (self.kernel - 1) * self.mixed

    @property
    def mixed(self) -> int:
        """Numbers that go through the convolution: queries, keys and values."""
        return 2 * self.keys + self.values

    def parameters(self, hidden: int) -> int:
        """Projections in (q, k, v; z; b; a), convolution, dt_bias and A_log, the gated norm, projection out."""
        into = hidden * (self.mixed + self.values + 2 * self.value_heads)
        return into + self.kernel * self.mixed + 2 * self.value_heads + self.value_dim + self.values * hidden


@dataclass(frozen=True)
class FeedForward:
    """A dense MLP (experts 0: `width` alone), or experts with a router and a gated shared one."""

    width: int
    experts: int = 0
    chosen: int = 0
    shared: int = 0

    def parameters(self, hidden: int) -> int:
        """All of them."""
        if not self.experts:
            return 3 * hidden * self.width
        return 3 * hidden * (self.experts * self.width + self.shared) + hidden * self.experts + hidden

    def active(self, hidden: int) -> int:
        """Those that one token passes through."""
        if not self.experts:
            return self.parameters(hidden)
        return 3 * hidden * (self.chosen * self.width + self.shared) + hidden * self.experts + hidden

    @property
    def active_width(self) -> int:
        """Numbers between the projections in and out, for one token."""
        return self.width if not self.experts else self.chosen * self.width + self.shared


@dataclass(frozen=True)
class Vision:
    """The tower that turns patches into tokens; merge**2 patches make one token."""

    depth: int
    hidden: int
    intermediate: int
    positions: int
    out: int
    merge: int
    patch_values: int
    patch_bytes: int  # of its pixels: an image has one frame

    @property
    def block(self) -> int:
        """Parameters of one block: two norms, attention, MLP."""
        attention = 4 * self.hidden * self.hidden + 4 * self.hidden
        return (
            4 * self.hidden
            + attention
            + 2 * self.hidden * self.intermediate
            + self.intermediate
            + self.hidden
        )

    @property
    def ends(self) -> int:
        """Parameters of the patch embedding, the position table and the merger."""
        merged = self.hidden * self.merge**2
        merger = 2 * self.hidden + merged * merged + merged + merged * self.out + self.out
        return self.patch_values * self.hidden + self.hidden + self.positions * self.hidden + merger

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.depth * self.block + self.ends


@dataclass(frozen=True)
class ModelShape:
    """A whole model.

    vocabulary, hidden: sizes V and H; attention_layers, delta_layers: how many layers of each kind; tied: whether the
    head is the embedding.
    """

    vocabulary: int
    hidden: int
    attention_layers: int
    delta_layers: int
    tied: bool
    attention: Attention
    delta: DeltaNet
    feed_forward: FeedForward
    vision: Vision

    @property
    def layers(self) -> int:
        """Layers of the language model."""
        return self.attention_layers + self.delta_layers

    @property
    def embedding(self) -> int:
        """Parameters of the table V x H."""
        return self.vocabulary * self.hidden

    @property
    def parts(self) -> dict[str, int]:
        """Parameters by part; they add up to the model's."""
        h = self.hidden
        return {
            "vision tower": self.vision.parameters,
            "embedding": self.embedding,
            "head": 0 if self.tied else self.embedding,
            "attention layers": self.attention_layers * self.attention.parameters(h),
            "GatedDeltaNet layers": self.delta_layers * self.delta.parameters(h),
            "MLP" if not self.feed_forward.experts else "experts": self.layers
            * self.feed_forward.parameters(h),
            "norms": (2 * self.layers + 1) * h,
        }

    @property
    def parameters(self) -> int:
        """All of them, a tied table once."""
        return sum(self.parts.values())

    @property
    def body(self) -> int:
        """Parameters that a token of the language model is multiplied with, without embedding and head."""
        h = self.hidden
        mixing = self.attention_layers * self.attention.parameters(
            h
        ) + self.delta_layers * self.delta.parameters(h)
        return mixing + self.layers * self.feed_forward.active(h)

    @property
    def largest_layer(self) -> int:
        """Parameters of the largest unit beside the root that FSDP2 gathers whole: a decoder layer."""
        h = self.hidden
        kinds = [
            part.parameters(h)
            for part, count in ((self.attention, self.attention_layers), (self.delta, self.delta_layers))
            if count
        ]
        return max(kinds) + self.feed_forward.parameters(h) + 2 * h


def read(model: str) -> ModelShape:
    """The shape of a model folder (config.json alone is enough) or hub id.

    Raises:
        UserError: no config.json within reach, or one of a kind that is not known here.
    """
    return shape(model_config.whole(model), model)


def shape(config: Mapping[str, Any], model: str = "config.json") -> ModelShape:
    """The shape that a config.json, read as a mapping, states.

    Raises:
        UserError: not a Qwen3.5 with a vision tower, or a number is missing.
    """
    kind = config.get("model_type")
    if kind not in KNOWN or not config.get(TEXT) or not isinstance(config.get(VISION), dict):
        raise UserError(
            f"{model}: model_type {kind!r} is none whose memory can be estimated ({', '.join(KNOWN)}, with text_config "
            "and vision_config); a run may still work."
        )
    text = _Section(config[TEXT], f"{model}: {TEXT}")
    # Absent, a flag is off in transformers' classes too.
    tied = bool(config.get("tie_word_embeddings", False))
    kinds = _layer_kinds(text)
    moe = kind == "qwen3_5_moe"
    return ModelShape(
        vocabulary=text["vocab_size"],
        hidden=text["hidden_size"],
        attention_layers=kinds.count("full_attention"),
        delta_layers=kinds.count("linear_attention"),
        tied=tied,
        attention=Attention(
            text["num_attention_heads"],
            text["num_key_value_heads"],
            text["head_dim"],
            bool(config[TEXT].get("attention_bias", False)),
        ),
        delta=DeltaNet(
            text["linear_num_key_heads"],
            text["linear_num_value_heads"],
            text["linear_key_head_dim"],
            text["linear_value_head_dim"],
            text["linear_conv_kernel_dim"],
        ),
        feed_forward=FeedForward(
            text["moe_intermediate_size"],
            text["num_experts"],
            text["num_experts_per_tok"],
            text["shared_expert_intermediate_size"],
        )
        if moe
        else FeedForward(text["intermediate_size"]),
        vision=_vision(_Section(config[VISION], f"{model}: {VISION}")),
    )


class _Section:
    """Positive whole numbers of a part of the config, or a sentence that names the one that is not there."""

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        self.values, self.name = values, name

    def __getitem__(self, key: str) -> int:
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(
                f"{self.name}.{key} is {value!r}, not a whole number above 0; copy config.json again."
            )
        return value


def _layer_kinds(text: _Section) -> list[str]:
    layers = text["num_hidden_layers"]
    kinds = text.values.get("layer_types")
    if kinds is None:
        interval = text.values.get("full_attention_interval", 4)
        return ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)]
    if len(kinds) != layers or set(kinds) - {"linear_attention", "full_attention"}:
        raise UserError(f"{text.name}.layer_types does not name a known kind for each of {layers} layers.")
    return list(kinds)


def _vision(part: _Section) -> Vision:
    def sides(key: str, count: int) -> int:
        value = part.values.get(key)
        return prod(value) if isinstance(value, list | tuple) else part[key] ** count

    return Vision(
        depth=part["depth"],
        hidden=part["hidden_size"],
        intermediate=part["intermediate_size"],
        positions=part["num_position_embeddings"],
        out=part["out_hidden_size"],
        merge=part["spatial_merge_size"],
        patch_values=part["in_channels"] * sides("temporal_patch_size", 1) * sides("patch_size", 2),
        patch_bytes=part["in_channels"] * sides("patch_size", 2),
    )
