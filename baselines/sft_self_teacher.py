"""SFT on the self-teacher: the student learns, from the full image, its own initial correct answers to the crop.

    y_1 ... y_n ~ p_initial(. | I', q)          for every prompt of the run, before the first update
    L = - mean over kept i of 1/|y_i| sum_t log p_S(y_it | I, q, y_i<t)

Kept are the answers that the rule finds correct and that ended by themselves. Off-policy by construction. An update
without any kept answer changes nothing and is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vopd.bounds import one_of
from vopd.divergence import sampled_token_log_prob
from vopd.method import Method, Rollout, Rollouts, ScoreChunk, UpdateBatch, sequence_mean
from vopd.views import VIEWS


@dataclass
class Settings:
    """The Vision-OPD paper gives no settings for this baseline; the view is its teacher's."""

    teacher_view: str = one_of("crop", *VIEWS)


@dataclass(frozen=True)
class SFT(Method):
    """Likelihood of the kept answers; the others have no weight in the loss."""

    def prepare(self, rollouts: Rollouts) -> Mapping[str, torch.Tensor]:
        return {"kept": rollouts.correct_B & ~rollouts.truncated_B}

    def score(self, chunk: ScoreChunk) -> dict[str, torch.Tensor]:
        return {"log_prob": sampled_token_log_prob(chunk.student_logits_CV, chunk.tokens_C)}

    def loss(
        self, per_token: Mapping[str, torch.Tensor], mask_BT: torch.Tensor, batch: UpdateBatch
    ) -> torch.Tensor:
        return sequence_mean(-per_token["log_prob"], mask_BT, batch)

    def record(self) -> dict[str, Any]:
        return {
            "anchor": f"answers of the initial weights on {self.rollout.view}",
            "objective": "negative log-likelihood of right answers",
            "normalisation": "per-sequence mean over kept answers",
            "clip": "none",
        }


def build(settings: Settings) -> Method:
    """The method with these settings."""
    return SFT(outputs=("log_prob",), rollout=Rollout(settings.teacher_view, "initial"))
