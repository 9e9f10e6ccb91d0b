"""The delta rule computes what transformers' layer computes, values and gradients, and keeps packed rows apart."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.qwen3_5 import modeling_qwen3_5 as hf
from verl.models.transformers.qwen3_5 import _call_accepts_kwarg

from vopd.backbone.delta_rule import LONGEST_CHUNK, chunking, gated_delta_rule, install


class Layer(nn.Module):
    """Carries a rule the way a GatedDeltaNet layer does."""

    chunk_gated_delta_rule = staticmethod(hf.torch_chunk_gated_delta_rule)


def inputs(length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, length, 3, 8, generator=generator) for _ in range(3))
    g = -torch.rand(2, length, 3, generator=generator)
    beta = torch.rand(2, length, 3, generator=generator)
    return [x.requires_grad_() for x in (q, k, v, g, beta)]


def call(layer: nn.Module, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients of one call with the arguments that the layer passes."""
    q, k, v, g, beta = tensors
    rule = layer.chunk_gated_delta_rule
    out, _ = rule(
        q, k, v, g=g, beta=beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=True
    )
    return [out.detach(), *torch.autograd.grad(out.square().sum(), tensors)]


@pytest.mark.parametrize(
    "length", [1, LONGEST_CHUNK - 1, LONGEST_CHUNK, LONGEST_CHUNK + 1, 3 * LONGEST_CHUNK + 5]
)
def test_equals_transformers(length: int) -> None:
    fast = Layer()
    assert install(fast) == 1
    for ours, theirs in zip(call(fast, inputs(length)), call(Layer(), inputs(length)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


def test_a_changed_decay_is_seen() -> None:
    fast = Layer()
    install(fast)
    changed = inputs(LONGEST_CHUNK)
    changed[3] = (changed[3].detach() * 1.5).requires_grad_()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            call(fast, changed)[0], call(Layer(), inputs(LONGEST_CHUNK))[0], rtol=2e-4, atol=2e-5
        )


def test_verl_sees_that_it_takes_no_boundaries() -> None:
    fast = Layer()
    install(fast)
    assert not _call_accepts_kwarg(fast.chunk_gated_delta_rule, "cu_seqlens")
    assert _call_accepts_kwarg(Layer().chunk_gated_delta_rule, "cu_seqlens")


def test_a_fast_kernel_stays() -> None:
    class Fast(nn.Module):
        chunk_gated_delta_rule = staticmethod(call)

    layer = Fast()
    assert install(layer) == 0
    assert layer.chunk_gated_delta_rule is call


@given(st.integers(0, 10_000))
def test_chunks_are_few_and_hold_every_token(length: int) -> None:
    chunks, size = chunking(length)
    assert size <= LONGEST_CHUNK and chunks * size >= length
    assert (chunks - 1) * LONGEST_CHUNK < max(length, 1)
    assert chunks * size - length < max(chunks, 2)


def filled_in_backward(length: int) -> int:
    """Elements that the backward of one call writes, all operations together."""

    class Counting(TorchDispatchMode):
        written = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor) and not func.is_view:
                    self.written += leaf.numel()
            return out

    tensors = inputs(length)
    out, _ = gated_delta_rule(*tensors)
    with Counting() as counting:
        torch.autograd.grad(out.sum(), tensors)
    return counting.written


def test_the_backward_is_linear_in_the_length() -> None:
    short, long = filled_in_backward(10 * LONGEST_CHUNK), filled_in_backward(40 * LONGEST_CHUNK)
    assert long < 4.5 * short


def test_twin_an_index_in_the_loop_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    unbind = torch.Tensor.unbind

    def one_by_one(x: torch.Tensor, dim: int = 0) -> Any:
        return [x.select(dim, i) for i in range(x.shape[dim])] if x.ndim > 3 else unbind(x, dim)

    monkeypatch.setattr(torch.Tensor, "unbind", one_by_one)
    with pytest.raises(AssertionError):
        test_the_backward_is_linear_in_the_length()


def test_autocast_leaves_its_precision() -> None:
    tensors = inputs(50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = gated_delta_rule(*tensors)[0]
    assert torch.equal(within, gated_delta_rule(*tensors)[0])


def test_refuses_a_cache() -> None:
    fast = Layer()
    install(fast)
    q, k, v, g, beta = inputs(4)
    with pytest.raises(NotImplementedError, match="no cache"):
        fast.chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True)
