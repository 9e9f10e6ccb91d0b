"""The chunked gated delta rule in plain torch, fast on a CPU: what Qwen3.5's linear-attention layers compute.

transformers' fallback solves each chunk's triangular system by a Python loop over its rows, whose backward fills the
whole system once per row; on the miniature that is half of a training step. Here one triangular solve does it.
On GPUs the layers keep their own kernel.

Shape suffixes: B rows, T tokens, H heads, D head size of keys (and of values).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 32


def gated_delta_rule(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    state_BHDD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = e^g_t S_{t-1} (I - b k k^T) + b v k^T, read by q (arXiv:2412.06464); q and k normalised here.

    Starts from `state_BHDD`, or from zero. Returns o (B, T, H, D) and the last state (B, H, D_k, D_v).
    """
    batch, length, heads, dim = k_BTHD.shape
    pad = -length % CHUNK
    chunks = (length + pad) // CHUNK

    def split(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad))
        return x.transpose(1, 2).reshape(batch, heads, chunks, CHUNK, *x.shape[3:])

    q, k, v = split(unit(q_BTHD) * dim**-0.5), split(unit(k_BTHD)), split(v_BTHD)
    beta, decay = split(beta_BTH)[..., None], split(g_BTH).cumsum(-1)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    ratio = (decay[..., :, None] - decay[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    growth = decay.exp()[..., None]
    k_T = k.transpose(-1, -2)
    mixing = ((k * beta) @ k_T * ratio).tril(-1)
    right = torch.cat([v * beta, k * beta * growth], -1)
    solved = torch.linalg.solve_triangular(mixing, right, upper=False, unitriangular=True)
    value, key = solved.split([v.shape[-1], dim], -1)
    local = (q @ k_T) * ratio
    q_grown = q * growth
    k_left = (k * (decay[..., -1:] - decay).exp()[..., None]).transpose(-1, -2)
    kept = decay[..., -1].exp()[..., None, None]
    state = q.new_zeros(batch, heads, dim, v.shape[-1]) if state_BHDD is None else state_BHDD
    out = []
    for i in range(chunks):
        fresh = value[:, :, i] - key[:, :, i] @ state
        out.append(q_grown[:, :, i] @ state + local[:, :, i] @ fresh)
        state = state * kept[:, :, i] + k_left[:, :, i] @ fresh
    o = torch.stack(out, 2).reshape(batch, heads, chunks * CHUNK, -1)[:, :, :length]
    return o.transpose(1, 2), state


def unit(x: Tensor) -> Tensor:
    """x over its length along the last dimension, with the layer's epsilon."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _as_called_by_the_layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = True,
) -> tuple[Tensor, None]:
    """As the layer calls it in training: no state in, none out, queries and keys normalised inside.

    It takes no `cu_seqlens`, so verl calls it once per packed sequence (see vopd/backbone/packing.py).
    """
    if initial_state is not None or output_final_state or not use_qk_l2norm_in_kernel:
        raise NotImplementedError(
            "this delta rule serves training only: no cache, normalised queries and keys"
        )
    o, _ = gated_delta_rule(*map(wide, (query, key, value, g, beta)))
    return o.to(query.dtype), None


def install(model: nn.Module) -> int:
    """Give every linear-attention layer of `model` this rule; returns how many there were."""
    layers = [m for m in model.modules() if hasattr(m, "chunk_gated_delta_rule")]
    for layer in layers:
        layer.chunk_gated_delta_rule = _as_called_by_the_layer  # type: ignore[assignment]
    return len(layers)
