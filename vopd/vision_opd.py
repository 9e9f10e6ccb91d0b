"""Vision-OPD: on-policy self-distillation from the crop to the full image (arXiv 2605.18740).

The student answers from the full image; the teacher, the same weights' moving average, sees the enlarged crop and
scores the student's own tokens. Loss: per-token generalised JSD on the student's top-k plus the exact tail, mean
over each response (1/|y|), mean over responses (eq. 3-4). No label and no reward is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vopd.bounds import above, one_of, within
from vopd.divergence import divergence_name, top_k_tail_divergence
from vopd.method import WEIGHTS, Method, ScoreChunk, Scorer, UpdateBatch, sequence_mean
from vopd.views import VIEWS


@dataclass
class Settings:
    """Paper, section 4.1 and Tables 3-6: JSD 0.5 on the student's top-100 plus tail, EMA teacher at rate 0.05."""

    top_k: int = within(100, 1, 10_000_000)
    beta: float = within(0.5, 0, 1)
    teacher: str = one_of("ema", *WEIGHTS)
    teacher_rate: float = above(0.05, 0, 1)
    teacher_view: str = one_of("crop", *VIEWS)


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
        return sequence_mean(per_token["divergence"], mask_BT, batch)

    def record(self) -> dict[str, Any]:
        s = self.settings
        return {
            "anchor": str(self.scorers["teacher"]),
            "objective": f"{divergence_name(s.beta)}, student top-{s.top_k} + tail",
            "normalisation": "per-sequence mean",
            "clip": "none",
        }


def build(settings: Settings) -> Method:
    """The method with these settings."""
    return VisionOPD(
        outputs=("divergence", "student_mass", "teacher_mass", "entropy"),
        scorers={"teacher": Scorer(settings.teacher_view, settings.teacher, settings.teacher_rate)},
        least_vocabulary=settings.top_k,
        settings=settings,
    )
