"""Float32 for vLLM's GatedDeltaNet layers on CPU, for the rollout and for evaluation alike.

vLLM 0.24 computes them on a CPU in bf16 alone ("CPU GDN attention requires BF16"), and thereby forces bf16 upon the
whole model. That is slow wherever the processor has no bf16 instructions (most laptops), and lets the composition of
a batch tip a sampled token. This is its `cpu_gdn_attention_core` in plain torch, all requests of a step together.

Shape suffixes: N requests (decode: one token each), T tokens of the longest, S = T + K - 1, L tokens of all, C channels
of q, k and v, K width of the convolution, H value heads, D head size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

from vopd.backbone.causal_convolution import causal_convolution
from vopd.backbone.delta_rule import gated_delta_rule, unit


def last_inputs(padded_NSC: Tensor, lengths_N: Tensor, width: int) -> Tensor:
    """The K - 1 inputs (N, K - 1, C) that each request's next token will be convolved with; `width` is K - 1."""
    index_NK = lengths_N[:, None] + torch.arange(width)
    return padded_NSC[torch.arange(len(padded_NSC))[:, None], index_NK]


def one_step(
    q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, g_NH: Tensor, beta_NH: Tensor, state_NHDD: Tensor
) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` for a single token: o (N, H, D) and the new state (N, H, D_k, D_v)."""
    q_NHD, k_NHD = unit(q_NHD) * k_NHD.shape[-1] ** -0.5, unit(k_NHD)
    state_NHDD = state_NHDD * g_NH.exp()[..., None, None]
    known_NHD = (k_NHD[..., None, :] @ state_NHDD).squeeze(-2)
    fresh_NHD = (v_NHD - known_NHD) * beta_NH[..., None]
    state_NHDD = torch.baddbmm(
        state_NHDD.flatten(0, 1), k_NHD.flatten(0, 1)[..., None], fresh_NHD.flatten(0, 1)[:, None]
    ).view_as(state_NHDD)
    return (q_NHD[..., None, :] @ state_NHDD).squeeze(-2), state_NHDD


class _Layer:
    """What the computation needs of one of vLLM's layers, split by kind of request."""

    def __init__(self, layer: Any, dim_first: bool) -> None:
        conv, state = layer.kv_cache
        self.conv_SCK = conv if dim_first else conv.transpose(-1, -2)
        slots, heads, v_dim, k_dim = state.shape
        self.state_SHDD = state.view(slots, heads, k_dim, v_dim)  # memory that nothing else reads
        self.weight_CK = layer.conv1d.weight.view(layer.conv1d.weight.shape[0], -1)
        self.bias_C, self.layer, self.heads = layer.conv1d.bias, layer, heads

    def gates(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the decay and the write strength, per token and value head."""
        g = -self.layer.A_log.float().exp() * F.softplus(a.float() + self.layer.dt_bias.float())
        return g, b.float().sigmoid()

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., C) -> q, k and v, each (..., H, D)."""
        key, value = self.layer.key_dim // self.layer.tp_size, self.layer.value_dim // self.layer.tp_size
        q, k, v = x.split([key, key, value], -1)
        q, k = (y.unflatten(-1, (-1, self.layer.head_k_dim)) for y in (q, k))
        repeats = self.heads // q.shape[-2]
        v = v.unflatten(-1, (-1, self.layer.head_v_dim))
        return q.repeat_interleave(repeats, -2), k.repeat_interleave(repeats, -2), v

    def decode(self, x_NC: Tensor, a_NH: Tensor, b_NH: Tensor, slots_N: Tensor) -> Tensor:
        """One token of each request; (N, H, D)."""
        width = self.weight_CK.shape[-1] - 1
        padded_NCK = torch.cat([self.conv_SCK[slots_N, :, :width], x_NC[..., None]], -1)
        self.conv_SCK[slots_N, :, :width] = padded_NCK[..., 1:]
        y_NC = (padded_NCK * self.weight_CK).sum(-1)
        if self.bias_C is not None:
            y_NC = y_NC + self.bias_C
        y_NC = F.silu(y_NC)
        o_NHD, state_NHDD = one_step(*self.split(y_NC), *self.gates(a_NH, b_NH), self.state_SHDD[slots_N])
        self.state_SHDD[slots_N] = state_NHDD
        return o_NHD

    def prefill(
        self, x_LC: Tensor, a_LH: Tensor, b_LH: Tensor, slots_N: Tensor, starts: list[int], old_N: Tensor
    ) -> Tensor:
        """The prompts (or pieces of them) of all requests; (L, H, D). Padding neither decays nor writes."""
        width = self.weight_CK.shape[-1] - 1
        lengths = [end - start for start, end in pairwise(starts)]
        padded = [
            torch.nn.utils.rnn.pad_sequence(list(t.split(lengths)), batch_first=True)
            for t in (x_LC, *self.gates(a_LH, b_LH))
        ]
        x_NTC, g_NTH, beta_NTH = padded
        # Filled, not multiplied by zero: what another request has left may be anything, NaN included.
        fresh_N = ~old_N
        before_NCK = self.conv_SCK[slots_N, :, :width].masked_fill(fresh_N[:, None, None], 0.0)
        state_NHDD = self.state_SHDD[slots_N].masked_fill(fresh_N[:, None, None, None], 0.0)
        padded_NSC = torch.cat([before_NCK.transpose(1, 2), x_NTC], 1)
        y_NTC = F.silu(causal_convolution(padded_NSC, self.weight_CK, self.bias_C))
        o_NTHD, state_NHDD = gated_delta_rule(*self.split(y_NTC), g_NTH, beta_NTH, state_NHDD)
        last_NKC = last_inputs(padded_NSC, torch.tensor(lengths), width)
        self.conv_SCK[slots_N, :, :width] = last_NKC.transpose(1, 2)
        self.state_SHDD[slots_N] = state_NHDD
        return torch.cat([o_THD[:n] for o_THD, n in zip(o_NTHD, lengths, strict=True)])


def cpu_gdn_attention_core(
    mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, core_attn_out: torch.Tensor, layer_name: Any
) -> None:
    """vLLM's custom operator of this name, for float32: mixed_qkv (L, C), b and a (L, H) -> core_attn_out (L, H, D).

    Raises:
        NotImplementedError: speculative decoding, as in vLLM's own operator.
    """
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
    from vllm.utils.torch_utils import _resolve_layer_name

    context = get_forward_context()
    if context.attn_metadata is None:  # vLLM's warm-up, before there is a cache
        return
    layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
    step: Any = context.attn_metadata[layer.prefix]
    if step.spec_sequence_masks is not None or step.num_accepted_tokens is not None:
        raise NotImplementedError("GatedDeltaNet on CPU: no speculative decoding.")
    own = _Layer(layer, is_conv_state_dim_first())
    slots = step.non_spec_state_indices_tensor
    decodes, split, end = (
        step.num_decodes,
        step.num_decode_tokens,
        step.num_decode_tokens + step.num_prefill_tokens,
    )
    if decodes:
        core_attn_out[:split] = own.decode(mixed_qkv[:split], a[:split], b[:split], slots[:decodes])
    if step.num_prefills:
        several = slice(decodes, decodes + step.num_prefills)
        starts = step.non_spec_query_start_loc[decodes : decodes + step.num_prefills + 1].tolist()
        core_attn_out[split:end] = own.prefill(
            mixed_qkv[split:end], a[split:end], b[split:end], slots[several], starts,
            step.has_initial_state[several],
        )  # fmt: skip


def install() -> None:
    """Have vLLM register this operator in the place of its own; before it builds a model, in the same process."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    # On processors with AMX it packs the convolution's weight for its own operator, which knows bf16 alone.
    _custom_ops.causal_conv1d_weight_pack = lambda weight_CK: weight_CK[:, None]
    # The operator's schema is read off the annotations, and the type of a layer's name differs with torch's version.
    theirs = get_type_hints(gdn_attention.cpu_gdn_attention_core)
    cpu_gdn_attention_core.__annotations__["layer_name"] = theirs["layer_name"]
    gdn_attention.cpu_gdn_attention_core = cpu_gdn_attention_core
