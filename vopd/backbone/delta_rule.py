"""The chunked gated delta rule in plain torch: what Qwen3.5's linear-attention layers compute without a fast kernel.

transformers' fallback solves each chunk's triangular system by a Python loop over its rows, whose backward fills the
whole system once per row, and takes each chunk out of the whole sequence by an index, whose backward fills the whole
sequence once per chunk: time and traffic grow with the square of the length. Here one triangular solve does the first
and one `unbind` the second. It also takes any keyword and ignores it, `cu_seqlens` among them, so that the state of one
packed sequence would run on into the next; this one says what it takes, and verl calls it once per sequence.

Shape suffixes: B rows, T tokens, H heads, D head size of keys (and of values).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LONGEST_CHUNK = 40


def chunking(length: int) -> tuple[int, int]:
    """How many chunks and of how many tokens: as few as `LONGEST_CHUNK` allows, alike, so that little is padding."""
    chunks = max(-(-length // LONGEST_CHUNK), 1)
    return chunks, max(-(-length // chunks), 1)


def gated_delta_rule(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    state_BHDD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = e^g_t S_{t-1} (I - b k k^T) + b v k^T, read by q (arXiv:2412.06464); q and k normalised here.

    Starts from `state_BHDD`, or from zero; computes in the type of its inputs, under autocast too. Returns o
    (B, T, H, D) and the last state (B, H, D_k, D_v).
    """
    with torch.autocast(q_BTHD.device.type, enabled=False):
        return _chunked(q_BTHD, k_BTHD, v_BTHD, g_BTH, beta_BTH, state_BHDD)


def _chunked(
    q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, g_BTH: Tensor, beta_BTH: Tensor, state_BHDD: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, length, heads, dim = k_BTHD.shape
    chunks, size = chunking(length)

    def split(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, chunks * size - length))
        return x.transpose(1, 2).reshape(batch, heads, chunks, size, *x.shape[3:])

    q, k, v = split(unit(q_BTHD) * dim**-0.5), split(unit(k_BTHD)), split(v_BTHD)
    beta, decay = split(beta_BTH)[..., None], split(g_BTH).cumsum(-1)
    lower = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    ratio = (decay[..., :, None] - decay[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    growth = decay.exp()[..., None]
    k_T = k.transpose(-1, -2)
    mixing = ((k * beta) @ k_T * ratio).tril(-1)
    right = torch.cat([v * beta, k * beta * growth], -1)
    solved = torch.linalg.solve_triangular(mixing, right, upper=False, unitriangular=True)
    value, key = solved.split([v.shape[-1], dim], -1)
    local = (q @ k_T) * ratio
    k_left = (k * (decay[..., -1:] - decay).exp()[..., None]).transpose(-1, -2)
    kept = decay[..., -1].exp()[..., None, None]
    state = q.new_zeros(batch, heads, dim, v.shape[-1]) if state_BHDD is None else state_BHDD
    out = []
    # Unbound once: an index in the loop would fill a gradient of the whole sequence for every chunk.
    parts = (x.unbind(2) for x in (value, key, q * growth, local, kept, k_left))
    for value_c, key_c, q_c, local_c, kept_c, k_left_c in zip(*parts, strict=True):
        fresh = value_c - key_c @ state
        out.append(q_c @ state + local_c @ fresh)
        state = state * kept_c + k_left_c @ fresh
    o = torch.stack(out, 2).reshape(batch, heads, chunks * size, -1)[:, :, :length]
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
    """As the layer calls it in training: no state in, none out, queries and keys normalised inside."""
    if initial_state is not None or output_final_state or not use_qk_l2norm_in_kernel:
        raise NotImplementedError(
            "this delta rule serves training only: no cache, normalised queries and keys"
        )
    o, _ = gated_delta_rule(*map(wide, (query, key, value, g, beta)))
    return o.to(query.dtype), None


def install(model: nn.Module) -> int:
    """Give this rule to every linear-attention layer that has transformers' own; returns how many there were."""
    layers = [m for m in model.modules() if is_plain(getattr(m, "chunk_gated_delta_rule", None))]
    for layer in layers:
        layer.chunk_gated_delta_rule = _as_called_by_the_layer  # type: ignore[assignment]
    return len(layers)


def is_plain(rule: object) -> bool:
    """Whether a layer's rule is transformers' own in plain torch, not a kernel of another package."""
    return getattr(rule, "__module__", "").startswith("transformers.")
