"""One copy of a prompt for all its rollouts: what makes an update of n rollouts per prompt cheap where rows are padded.

A row is then a prompt and, behind it, all its responses; each response continues the prompt and attends to no other
one. Attention gets that by a mask, GatedDeltaNet by its two functions that look along the sequence: the convolution,
whose first outputs of a response reach back into the prompt, and the delta rule, which starts every response from the
state behind the prompt. Gradients of the shared prompt add up by themselves.

Shape suffixes: G rows (prompts), P longest prompt, n most responses of a prompt, R longest response, W = P + n R width
of a row, B = G n responses, C channels, K width of the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vopd.backbone.causal_convolution import causal_convolution
from vopd.backbone.delta_rule import gated_delta_rule, wide


@dataclass(frozen=True)
class Layout:
    """Where things lie in a batch: prompts right-padded to P, then n places of R tokens, empty ones at the end.

    Args:
        prompt_G: lengths of the prompts.
        P, n, R: see the legend.
    """

    prompt_G: Tensor
    P: int
    n: int
    R: int

    @property
    def width(self) -> int:
        return self.P + self.n * self.R

    def to(self, device: Any) -> Layout:
        return replace(self, prompt_G=self.prompt_G.to(device))

    def mask(self) -> Tensor:
        """(G, 1, W, W), true where a query (third dimension) sees a key."""
        device = self.prompt_G.device
        place_W = torch.arange(self.width, device=device)
        segment_W = (place_W - self.P).div(self.R, rounding_mode="floor").clamp(min=-1)
        in_prompt_W = segment_W < 0
        seen_WW = (place_W[:, None] >= place_W) & ((segment_W[:, None] == segment_W) | in_prompt_W)
        filler_GW = in_prompt_W & (place_W >= self.prompt_G[:, None])
        return (seen_WW & ~filler_GW[:, None, :])[:, None]

    def positions(self, row: int, place: int, length: int) -> Tensor:
        """Places in the flattened (G * W) batch whose hidden states predict a response's `length` tokens.

        The first token is predicted at the last one of the prompt, the others each at the one before.
        """
        start = row * self.width
        own = torch.arange(max(length - 1, 0)) + start + self.P + place * self.R
        return torch.cat([torch.tensor([start + int(self.prompt_G[row]) - 1]), own])[:length]

    def split(self, x_GWx: Tensor) -> tuple[Tensor, Tensor]:
        """(G, W, ...) as prompts (G, P, ...) and responses (B, R, ...).

        Raises:
            ValueError: a batch that is not laid out so.
        """
        if x_GWx.shape[:2] != (len(self.prompt_G), self.width):
            raise ValueError(
                f"{tuple(x_GWx.shape[:2])} rows and tokens do not fit the layout {(len(self.prompt_G), self.width)}."
            )
        return x_GWx[:, : self.P], x_GWx[:, self.P :].reshape(-1, self.R, *x_GWx.shape[2:])

    def join(self, prompt_GPx: Tensor, response_BRx: Tensor) -> Tensor:
        """Counterpart of `split`."""
        responses = response_BRx.reshape(len(prompt_GPx), self.n * self.R, *response_BRx.shape[2:])
        return torch.cat([prompt_GPx, responses], 1)

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, seq_idx: None
    ) -> Tensor:
        """The layer's causal convolution over (G, C, W) with weight (C, K); stands where its fast kernel would."""
        if activation != "silu" or seq_idx is not None:
            raise NotImplementedError("shared prompts: the convolution is followed by silu and is not packed")
        reach = weight.shape[-1] - 1
        prompt_GPC, response_BRC = self.split(x.transpose(1, 2))
        before_GKC = F.pad(prompt_GPC, (0, 0, reach, 0))
        # The prompt's last tokens; the padding has moved them by `reach`.
        place_GK = self.prompt_G[:, None] + torch.arange(reach, device=x.device)
        tail_GKC = before_GKC[torch.arange(len(prompt_GPC), device=x.device)[:, None], place_GK]
        after_BRC = torch.cat([tail_GKC.repeat_interleave(self.n, 0), response_BRC], 1)
        sides = [causal_convolution(side, weight, bias) for side in (before_GKC, after_BRC)]
        return F.silu(self.join(*sides)).transpose(1, 2)

    def delta_rule(
        self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **call: Any
    ) -> tuple[Tensor, None]:
        """The layer's delta rule over (G, W, heads, size), called as in training: no state in, none out."""
        if call.get("initial_state") is not None or call.get("output_final_state"):
            raise NotImplementedError("shared prompts: no cache")
        place_P = torch.arange(self.P, device=query.device)
        real_GP1 = (place_P < self.prompt_G[:, None])[..., None]
        q, k, v, fading, writing = (self.split(wide(x)) for x in (query, key, value, g, beta))
        # Behind its end a prompt's padding must neither write to the state nor let it fade.
        prompt_out, state = gated_delta_rule(q[0], k[0], v[0], fading[0] * real_GP1, writing[0] * real_GP1)
        response_out, _ = gated_delta_rule(
            q[1], k[1], v[1], fading[1], writing[1], state.repeat_interleave(self.n, 0)
        )
        return self.join(prompt_out, response_out).to(query.dtype), None


class SharedPrompts:
    """Switches a model's GatedDeltaNet layers between their own functions and those of a layout."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[Any] = [m for m in model.modules() if hasattr(m, "chunk_gated_delta_rule")]
        self.own = [(layer.causal_conv1d_fn, layer.chunk_gated_delta_rule) for layer in self.layers]

    def use(self, layout: Layout | None) -> None:
        """From here on, until the next call: gradient checkpoints run forward again inside the backward."""
        for layer, (convolution, rule) in zip(self.layers, self.own, strict=True):
            layer.causal_conv1d_fn = layout.convolve if layout else convolution
            layer.chunk_gated_delta_rule = layout.delta_rule if layout else rule
