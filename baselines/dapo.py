"""DAPO (arXiv 2503.14476): GRPO with dynamic sampling, a higher upper clip, a mean over tokens and a length penalty.

    L   = - 1 / sum_i |y_i|  sum_i sum_t min( r_it A_i, clip(r_it, 1 - 0.2, 1 + 0.28) A_i )
    R_i = (1 if correct else -1) + penalty(|y_i|)
    penalty(l) = 0 up to L_max - L_c, then ((L_max - L_c) - l) / L_c, -1 where the limit L_max cut the answer off

Groups whose answers are all correct or all incorrect are discarded, by correctness and not by reward: a length penalty
would give an all-incorrect group a spread. The next prompts of the stream take their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vopd.backbone.policy_gradient import TOKEN_MEAN, policy_loss
from vopd.bounds import above
from vopd.divergence import sampled_token_log_prob
from vopd.method import Method, Rollout, Rollouts, ScoreChunk, UpdateBatch


@dataclass
class Settings:
    """Paper: clip 0.2 and 0.28; its buffer of 4,096 of 20,480 tokens is a fifth of the response limit."""

    clip_low: float = above(0.2, 0, 1)
    clip_high: float = above(0.28, 0, 10)
    buffer: float = above(0.2, 0, 1)


def overlong_penalty(
    lengths_B: torch.Tensor, truncated_B: torch.Tensor, limit: int, share: float
) -> torch.Tensor:
    """Eq. 13 of the paper, from 0 to -1; `share` of the limit is the buffer in which it grows."""
    buffer = max(1.0, share * limit)
    soft_B = ((limit - buffer - lengths_B) / buffer).clamp(-1.0, 0.0)
    return torch.where(truncated_B, torch.full_like(soft_B, -1.0), soft_B)


@dataclass(frozen=True)
class DAPO(Method):
    """Dynamic sampling, asymmetric clip, mean over tokens, penalty for overlong responses."""

    settings: Settings = field(default_factory=Settings)

    def rewards(self, rollouts: Rollouts) -> torch.Tensor:
        share = self.settings.buffer
        penalty_B = overlong_penalty(rollouts.lengths_B, rollouts.truncated_B, rollouts.limit, share)
        return torch.where(rollouts.correct_B, 1.0, -1.0) + penalty_B

    def score(self, chunk: ScoreChunk) -> dict[str, torch.Tensor]:
        return {"log_prob": sampled_token_log_prob(chunk.student_logits_CV, chunk.tokens_C)}

    def loss(
        self, per_token: Mapping[str, torch.Tensor], mask_BT: torch.Tensor, batch: UpdateBatch
    ) -> torch.Tensor:
        s = self.settings
        return policy_loss(per_token["log_prob"], mask_BT, batch, TOKEN_MEAN, s.clip_low, s.clip_high)

    def record(self) -> dict[str, Any]:
        s = self.settings
        return {
            "anchor": "none",
            "objective": f"clipped policy gradient, groups filtered, length penalty in the last {s.buffer:.0%}",
            "normalisation": "token mean",
            "clip": f"ratio {1 - s.clip_low:g} to {1 + s.clip_high:g}",
        }


def build(settings: Settings) -> Method:
    """The method with these settings."""
    return DAPO(
        outputs=("log_prob",),
        rollout=Rollout(filter_groups=True),
        advantage="grpo",
        needs_old_log_probs=True,
        settings=settings,
    )
