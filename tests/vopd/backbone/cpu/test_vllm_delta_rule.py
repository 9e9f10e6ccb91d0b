"""vLLM's GatedDeltaNet on CPU in float32: against a recurrence token by token, however requests are cut and mixed."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

from vopd.backbone.cpu.vllm_delta_rule import _Layer, cpu_gdn_attention_core

KEY_HEADS, HEADS, KEY, VALUE, WIDTH, SLOTS = 2, 4, 8, 6, 4, 7
CHANNELS = 2 * KEY_HEADS * KEY + HEADS * VALUE


def layer(dim_first: bool = True) -> Any:
    """One of vLLM's layers, its cache full of what other requests have left there."""
    random = torch.Generator().manual_seed(1)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    conv = made(SLOTS, CHANNELS, WIDTH - 1) if dim_first else made(SLOTS, WIDTH - 1, CHANNELS)
    return SimpleNamespace(
        prefix="layer",
        kv_cache=(conv, made(SLOTS, HEADS, VALUE, KEY)),
        conv1d=SimpleNamespace(weight=made(CHANNELS, 1, WIDTH), bias=made(CHANNELS)),
        A_log=made(HEADS),
        dt_bias=made(HEADS),
        key_dim=KEY_HEADS * KEY,
        value_dim=HEADS * VALUE,
        head_k_dim=KEY,
        head_v_dim=VALUE,
        tp_size=1,
    )


def token_by_token(its: Any, x_TC: Tensor, a_TH: Tensor, b_TH: Tensor) -> Tensor:
    """The layer's definition (arXiv:2412.06464) for one request from its first token on, in float64; (T, H, D)."""
    w_CK, bias_C = its.conv1d.weight[:, 0].double(), its.conv1d.bias.double()
    padded_TC = torch.cat([torch.zeros(WIDTH - 1, CHANNELS), x_TC]).double()
    state_HDD, out = torch.zeros(HEADS, KEY, VALUE, dtype=torch.float64), []
    for t in range(len(x_TC)):
        y_C = F.silu((padded_TC[t : t + WIDTH] * w_CK.T).sum(0) + bias_C)
        q, k, v = y_C.split([KEY_HEADS * KEY, KEY_HEADS * KEY, HEADS * VALUE])
        q, k = (F.normalize(z.view(KEY_HEADS, KEY), dim=-1, eps=0).repeat_interleave(2, 0) for z in (q, k))
        v, decay = (
            v.view(HEADS, VALUE),
            -its.A_log.double().exp() * F.softplus((a_TH[t] + its.dt_bias).double()),
        )
        state_HDD = state_HDD * decay.exp()[:, None, None]
        fresh = (v - torch.einsum("hk,hkv->hv", k, state_HDD)) * b_TH[t].double().sigmoid()[:, None]
        state_HDD = state_HDD + torch.einsum("hk,hv->hkv", k, fresh)
        out.append(torch.einsum("hk,hkv->hv", q * KEY**-0.5, state_HDD))
    return torch.stack(out)


def request(length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(length, width, generator=random) for width in (CHANNELS, HEADS, HEADS))  # type: ignore


def check(found_THD: Tensor, expected_THD: Tensor) -> None:
    torch.testing.assert_close(found_THD.double(), expected_THD, rtol=1e-4, atol=2e-5)


def run_step(
    monkeypatch: pytest.MonkeyPatch, its: Any, requests: list[Any], slots: list[int], prefills: int
) -> Tensor:
    """One step of vLLM: requests that decode one token first, then those that are prefilled."""
    lengths = [len(r[0]) for r in requests]
    decodes = len(requests) - prefills
    step = SimpleNamespace(
        spec_sequence_masks=None,
        num_accepted_tokens=None,
        num_decodes=decodes,
        num_decode_tokens=decodes,
        num_prefills=prefills,
        num_prefill_tokens=sum(lengths[decodes:]),
        non_spec_state_indices_tensor=torch.tensor(slots),
        non_spec_query_start_loc=torch.tensor([0, *lengths]).cumsum(0),
        has_initial_state=torch.tensor([True] * decodes + [False] * prefills),
    )
    context = SimpleNamespace(attn_metadata={"layer": step}, no_compile_layers={"layer": its})
    monkeypatch.setattr("vllm.forward_context.get_forward_context", lambda: context)
    monkeypatch.setattr("vllm.utils.torch_utils._resolve_layer_name", lambda name: name)
    x, a, b = (torch.cat(parts) for parts in zip(*requests, strict=True))
    out = torch.full((sum(lengths) + 3, HEADS, VALUE), 7.0)  # rows beyond the tokens are left as they are
    cpu_gdn_attention_core(x, b, a, out, "layer")
    assert (out[sum(lengths) :] == 7.0).all()
    return out[: sum(lengths)]


def test_prompts_and_single_tokens_of_several_requests_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    its, first, second, third = layer(is_conv_state_dim_first()), request(9, 2), request(70, 3), request(1, 4)
    prompts = [tuple(part[:n] for part in r) for r, n in ((first, 8), (second, 69))]
    out = run_step(monkeypatch, its, prompts, [4, 0], 2)
    check(out[:8], token_by_token(its, *first)[:8])
    check(out[8:], token_by_token(its, *second)[:69])
    last = [tuple(part[-1:] for part in r) for r in (second, first)]
    out = run_step(monkeypatch, its, [*last, third], [0, 4, 2], 1)
    check(out[0], token_by_token(its, *second)[-1])
    check(out[1], token_by_token(its, *first)[-1])
    check(out[2:], token_by_token(its, *third))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.booleans(), st.integers(0, 9))
def test_a_request_in_pieces_equals_the_recurrence(pieces: list[int], dim_first: bool, seed: int) -> None:
    """Each piece beside another request's prompt; pieces of one token are decoded."""
    its, whole = layer(dim_first), request(sum(pieces), seed)
    own, other, found, start = _Layer(its, dim_first), request(5, 99), [], 0
    for place, piece in enumerate(pieces):
        x, a, b = (part[start : start + piece] for part in whole)
        if piece == 1 and place:
            found.append(own.decode(x, a, b, torch.tensor([3])))
        else:
            both = [torch.cat(pair) for pair in zip((x, a, b), other, strict=True)]
            continued = torch.tensor([place > 0, False])
            found.append(own.prefill(*both, torch.tensor([3, 5]), [0, piece, piece + 5], continued)[:piece])
        start += piece
    check(torch.cat(found), token_by_token(its, *whole))


def test_nan_left_in_the_cache_does_not_reach_a_new_request() -> None:
    its, prompt = layer(), request(6, 5)
    for cache in its.kv_cache:
        cache.fill_(torch.nan)
    found = _Layer(its, True).prefill(*prompt, torch.tensor([3]), [0, 6], torch.tensor([False]))
    check(found, token_by_token(its, *prompt))


def test_ours_takes_what_vllms_operator_takes() -> None:
    theirs = inspect.signature(gdn_attention.cpu_gdn_attention_core)
    assert list(inspect.signature(cpu_gdn_attention_core).parameters) == list(theirs.parameters)
    assert hasattr(gdn_attention, "register_cpu_gdn_attention_ops")


def test_twin_a_state_left_by_another_request_is_seen() -> None:
    its, prompt = layer(), request(6, 5)
    found = _Layer(its, True).prefill(*prompt, torch.tensor([3]), [0, 6], torch.tensor([True]))
    with pytest.raises(AssertionError):
        check(found, token_by_token(its, *prompt))
