"""Vision-OPD on the sampled token alone, the paper's alternative to the divergence over the top k.

    A_n = log p_T(y_n | I', q, y_<n) - log p_S(y_n | I, q, y_<n)
    L   = - 1/|y| sum_n stop_gradient(A_n) log p_S(y_n | I, q, y_<n)

An unbiased estimate of the reverse KL's gradient, with the variance of one sample a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vopd.bounds import above, one_of
from vopd.divergence import sampled_token_log_prob
from vopd.method import WEIGHTS, Method, ScoreChunk, Scorer, UpdateBatch, sequence_mean
from vopd.views import VIEWS


@dataclass
class Settings:
    """The teacher is Vision-OPD's."""

    teacher: str = one_of("ema", *WEIGHTS)
    teacher_rate: float = above(0.05, 0, 1)
    teacher_view: str = one_of("crop", *VIEWS)


@dataclass(frozen=True)
class SampledVisionOPD(Method):
    """Policy gradient whose advantage is the log ratio of teacher and student at the sampled token."""

    def score(self, chunk: ScoreChunk) -> dict[str, torch.Tensor]:
        log_prob_C = sampled_token_log_prob(chunk.student_logits_CV, chunk.tokens_C)
        teacher_C = sampled_token_log_prob(chunk.scorer_logits["teacher"], chunk.tokens_C)
        return {"log_prob": log_prob_C, "advantage": (teacher_C - log_prob_C).detach()}

    def loss(
        self, per_token: Mapping[str, torch.Tensor], mask_BT: torch.Tensor, batch: UpdateBatch
    ) -> torch.Tensor:
        return sequence_mean(-per_token["advantage"].detach() * per_token["log_prob"], mask_BT, batch)

    def record(self) -> dict[str, Any]:
        return {
            "anchor": str(self.scorers["teacher"]),
            "objective": "policy gradient of the reverse KL, sampled token",
            "normalisation": "per-sequence mean",
            "clip": "none",
        }


def build(settings: Settings) -> Method:
    """The method with these settings."""
    return SampledVisionOPD(
        outputs=("log_prob", "advantage"),
        scorers={"teacher": Scorer(settings.teacher_view, settings.teacher, settings.teacher_rate)},
    )
