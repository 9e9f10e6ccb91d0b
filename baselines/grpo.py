"""GRPO (arXiv 2402.03300): the group's own answers are the baseline; verl's estimator and policy loss.

For a question q with G answers y_1 ... y_G from the full image and rewards R_i (1 where the answer is correct by rule):

    A_i  = (R_i - mean(R)) / (std(R) + 1e-6)                      the same for each token of y_i
    r_it = p(y_it | q, y_i<t) / p_old(y_it | q, y_i<t)
    L    = - mean_i 1/|y_i| sum_t min( r_it A_i, clip(r_it, 1 - eps, 1 + eps) A_i )  [ + kl * mean k3(p_initial || p) ]

No scorer and no KL unless `kl` is above 0. With one update per rollout batch the ratio is 1 and the clip idle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vopd.backbone.policy_gradient import SEQUENCE_MEAN, aggregate, k3, policy_loss
from vopd.bounds import above, within
from vopd.divergence import sampled_token_log_prob
from vopd.method import Method, ScoreChunk, Scorer, UpdateBatch


@dataclass
class Settings:
    """Paper: clip 0.2, mean over each response, advantage over the group's standard deviation. Its KL (0.04) is off."""

    clip: float = above(0.2, 0, 1)
    kl: float = within(0.0, 0, 1000)


@dataclass(frozen=True)
class GRPO(Method):
    """Advantages normalised in the group, clipped policy gradient, mean per response."""

    settings: Settings = field(default_factory=Settings)

    def score(self, chunk: ScoreChunk) -> dict[str, torch.Tensor]:
        log_prob_C = sampled_token_log_prob(chunk.student_logits_CV, chunk.tokens_C)
        if not self.scorers:
            return {"log_prob": log_prob_C}
        reference_C = sampled_token_log_prob(chunk.scorer_logits["reference"], chunk.tokens_C)
        return {"log_prob": log_prob_C, "kl": k3(log_prob_C, reference_C)}

    def loss(
        self, per_token: Mapping[str, torch.Tensor], mask_BT: torch.Tensor, batch: UpdateBatch
    ) -> torch.Tensor:
        clip = self.settings.clip
        loss = policy_loss(per_token["log_prob"], mask_BT, batch, SEQUENCE_MEAN, clip, clip)
        if self.scorers:
            loss = loss + self.settings.kl * aggregate(per_token["kl"], mask_BT, batch, SEQUENCE_MEAN)
        return loss

    def record(self) -> dict[str, Any]:
        s = self.settings
        return {
            "anchor": f"KL (k3) {s.kl} to initial on full" if self.scorers else "none",
            "objective": "clipped policy gradient, reward by rule, advantage / std of the group",
            "normalisation": "per-sequence mean",
            "clip": f"ratio {1 - s.clip:g} to {1 + s.clip:g}",
        }


def build(settings: Settings) -> Method:
    """The method with these settings."""
    reference = {"reference": Scorer("full", "initial")} if settings.kl > 0 else {}
    return GRPO(
        outputs=("log_prob", "kl") if reference else ("log_prob",),
        scorers=reference,
        advantage="grpo",
        needs_old_log_probs=True,
        settings=settings,
    )
