"""The fast delta rule computes what transformers' layer computes, values and gradients, and keeps packed rows apart."""

import pytest
import torch
from torch import nn
from transformers.models.qwen3_5 import modeling_qwen3_5 as hf

from vopd.backbone.cpu.delta_rule import CHUNK, install
from vopd.backbone.packing import swallows_boundaries


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


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 5])
def test_equals_transformers(length: int) -> None:
    fast = Layer()
    assert install(fast) == 1
    for ours, theirs in zip(call(fast, inputs(length)), call(Layer(), inputs(length)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


def test_a_changed_decay_is_seen() -> None:
    fast = Layer()
    install(fast)
    changed = inputs(CHUNK)
    changed[3] = (changed[3].detach() * 1.5).requires_grad_()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            call(fast, changed)[0], call(Layer(), inputs(CHUNK))[0], rtol=2e-4, atol=2e-5
        )


def test_verl_sees_that_it_takes_no_boundaries() -> None:
    fast = Layer()
    install(fast)
    assert swallows_boundaries(Layer().chunk_gated_delta_rule)
    assert not swallows_boundaries(fast.chunk_gated_delta_rule)


def test_refuses_a_cache() -> None:
    fast = Layer()
    install(fast)
    q, k, v, g, beta = inputs(4)
    with pytest.raises(NotImplementedError, match="no cache"):
        fast.chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True)
