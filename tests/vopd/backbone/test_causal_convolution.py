"""The causal convolution against torch's own, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from vopd.backbone.causal_convolution import causal_convolution


def of_torch(x_BSC: torch.Tensor, weight_CK: torch.Tensor, bias_C: torch.Tensor | None) -> torch.Tensor:
    y_BCT = F.conv1d(x_BSC.transpose(1, 2), weight_CK[:, None], bias_C, groups=len(weight_CK))
    return y_BCT.transpose(1, 2)


@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_equals_torch(rows: int, length: int, channels: int, width: int, with_bias: bool) -> None:
    made = torch.Generator().manual_seed(length)
    x_BSC = torch.randn(rows, length + width - 1, channels, generator=made, dtype=torch.float64)
    weight_CK = torch.randn(channels, width, generator=made, dtype=torch.float64)
    bias_C = torch.randn(channels, generator=made, dtype=torch.float64) if with_bias else None
    inputs = [x.requires_grad_() for x in (x_BSC, weight_CK, bias_C) if x is not None]
    ours, theirs = causal_convolution(x_BSC, weight_CK, bias_C), of_torch(x_BSC, weight_CK, bias_C)
    torch.testing.assert_close(ours, theirs)
    loss_BTC = torch.randn(ours.shape, generator=made, dtype=torch.float64)
    grads = zip(
        torch.autograd.grad(ours, inputs, loss_BTC),
        torch.autograd.grad(theirs, inputs, loss_BTC),
        strict=True,
    )
    for one, other in grads:
        torch.testing.assert_close(one, other)


def test_a_look_ahead_is_seen() -> None:
    x_BSC, weight_CK = torch.randn(1, 6, 2), torch.randn(2, 3)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            causal_convolution(x_BSC.flip(1), weight_CK, None), of_torch(x_BSC, weight_CK, None)
        )
