"""Vision-OPD: on-policy self-distillation from the crop to the full image (arXiv 2605.18740).

The student answers from the full image; the teacher, the same weights' moving average, sees the enlarged crop and
scores the student's own tokens. Loss: per-token generalised JSD on the student's top-k plus the exact tail, mean
over each response (1/|y|), mean over responses (eq. 3-4). No label and no reward is used.

The authors' script differs from their paper in two ways, both offered here: the mean is over tokens, and each token is
weighted by the importance ratio of the trainer's policy before the update to the one that generated, truncated:

    w_n = min( p_trainer(y_n) / p_rollout(y_n), limit )
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vopd.bounds import above, one_of, within
from vopd.divergence import divergence_name, top_k_tail_divergence
from vopd.errors import UserError
from vopd.method import WEIGHTS, Method, ScoreChunk, Scorer, UpdateBatch, sequence_mean, token_mean
from vopd.views import VIEWS

AGGREGATIONS = {"sequence_mean": sequence_mean, "token_mean": token_mean}
LARGEST_LOG_RATIO = 20.0  # as in verl: its exponential stays finite


@dataclass
class Settings:
    """Paper, section 4.1 and Tables 3-6: JSD 0.5 on the student's top-100 plus tail, EMA teacher at rate 0.05.

    `importance_limit` weights tokens by their importance ratio, truncated there; None does not weight them.
    """

    top_k: int = within(100, 1, 10_000_000)
    beta: float = within(0.5, 0, 1)
    teacher: str = one_of("ema", *WEIGHTS)
    teacher_rate: float = above(0.05, 0, 1)
    teacher_view: str = one_of("crop", *VIEWS)
    aggregation: str = one_of("sequence_mean", "sequence_mean", "token_mean")
    importance_limit: float | None = above(None, 0, math.inf)


def importance_weights(batch: UpdateBatch, limit: float) -> torch.Tensor:
    """Truncated ratios (B, T), without gradient, of the trainer's policy before the update to the rollout's.

    Truncated importance sampling as verl's rollout correction has it at the level of tokens: min(ratio, limit).

    Raises:
        UserError: the rollout gave no log-probs.
    """
    if batch.rollout_log_probs_BT is None:
        raise UserError(
            "method.importance_limit weights tokens by the ratio to the policy that generated, and these rollouts "
            "have no log-probs; set method.importance_limit=null."
        )
    assert batch.old_log_probs_BT is not None
    log_ratio_BT = (batch.old_log_probs_BT - batch.rollout_log_probs_BT).detach()
    return log_ratio_BT.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp().clamp(max=limit)


@dataclass(frozen=True)
class VisionOPD(Method):
    """JSD over the student's top k and one tail bucket, to a teacher that sees the crop."""

    settings: Settings = field(default_factory=Settings)

    def score(self, chunk: ScoreChunk) -> dict[str, torch.Tensor]:
        student_CV, teacher_CV = chunk.student_logits_CV, chunk.scorer_logits["teacher"]
        found = top_k_tail_divergence(student_CV, teacher_CV, self.settings.top_k, self.settings.beta)
        return {
            "divergence": found.divergence_T,
            "student_mass": found.student_mass_T,
            "teacher_mass": found.teacher_mass_T,
            "entropy": found.entropy_T,
            "log_prob": found.log_prob(student_CV, chunk.tokens_C),
        }

    def loss(
        self, per_token: Mapping[str, torch.Tensor], mask_BT: torch.Tensor, batch: UpdateBatch
    ) -> torch.Tensor:
        divergence_BT, s = per_token["divergence"], self.settings
        if s.importance_limit is not None:
            divergence_BT = divergence_BT * importance_weights(batch, s.importance_limit)
        return AGGREGATIONS[s.aggregation](divergence_BT, mask_BT, batch)

    def record(self) -> dict[str, Any]:
        s, limit = self.settings, self.settings.importance_limit
        return {
            "anchor": str(self.scorers["teacher"]),
            "objective": f"{divergence_name(s.beta)}, student top-{s.top_k} + tail",
            "normalisation": "per-sequence mean" if s.aggregation == "sequence_mean" else "token mean",
            "clip": "none"
            if limit is None
            else f"importance weights to the rollout's policy, at most {limit:g}",
        }


def build(settings: Settings) -> Method:
    """The method with these settings."""
    return VisionOPD(
        outputs=("divergence", "student_mass", "teacher_mass", "entropy"),
        scorers={"teacher": Scorer(settings.teacher_view, settings.teacher, settings.teacher_rate)},
        needs_old_log_probs=settings.importance_limit is not None,
        least_vocabulary=settings.top_k,
        settings=settings,
    )
