"""OPSD (arXiv 2601.18734): the teacher sees the same image and is told the correct answer.

    L = E_{y ~ p_S(. | I, q)}  1/|y|  sum_n  D( p_T(. | I, q + answer, y_<n)  ||  p_S(. | I, q, y_<n) )

Two variants in one module. As the Vision-OPD paper runs it: D is the JSD on the student's top k plus tail, the teacher
a moving average. The original: D is the forward KL over the whole vocabulary, its entries clipped one by one,
sum_v min(p_T(v) log(p_T(v) / p_S(v)), clip), and the teacher the initial weights; its authors' code divides the logits
of both by a temperature first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vopd.bounds import above, one_of, within
from vopd.divergence import divergence_name, pointwise_forward_kl, top_k_tail_divergence
from vopd.errors import UserError
from vopd.method import WEIGHTS, Method, ScoreChunk, Scorer, UpdateBatch, sequence_mean
from vopd.views import VIEWS


@dataclass
class Settings:
    """Defaults: the Vision-OPD paper's variant.

    `clip` takes the original's divergence, without top_k and beta; `temperature` divides the logits in it.
    """

    top_k: int | None = within(100, 1, 10_000_000)
    beta: float = within(0.5, 0, 1)
    clip: float | None = above(None, 0, math.inf)
    temperature: float = above(1.0, 0, 100)
    teacher: str = one_of("ema", *WEIGHTS)
    teacher_rate: float = above(0.05, 0, 1)
    teacher_view: str = one_of("answer_hint", *VIEWS)


@dataclass(frozen=True)
class OPSD(Method):
    """Divergence to a teacher whose prompt holds the answer."""

    settings: Settings = field(default_factory=Settings)

    def score(self, chunk: ScoreChunk) -> dict[str, torch.Tensor]:
        student_CV, teacher_CV, s = chunk.student_logits_CV, chunk.scorer_logits["teacher"], self.settings
        if s.clip is not None:
            return {"divergence": pointwise_forward_kl(student_CV, teacher_CV, s.clip, s.temperature)}
        found = top_k_tail_divergence(student_CV, teacher_CV, s.top_k, s.beta)
        log_prob_C = found.log_prob(student_CV, chunk.tokens_C)
        return {"divergence": found.divergence_T, "entropy": found.entropy_T, "log_prob": log_prob_C}

    def loss(
        self, per_token: Mapping[str, torch.Tensor], mask_BT: torch.Tensor, batch: UpdateBatch
    ) -> torch.Tensor:
        return sequence_mean(per_token["divergence"], mask_BT, batch)

    def record(self) -> dict[str, Any]:
        s = self.settings
        support = "full vocabulary" if s.top_k is None else f"student top-{s.top_k} + tail"
        tempered = "" if s.temperature == 1.0 else f", logits / {s.temperature:g}"
        return {
            "anchor": str(self.scorers["teacher"]),
            "objective": f"{divergence_name(s.beta)}, {support}"
            if s.clip is None
            else f"forward KL, full vocabulary{tempered}",
            "normalisation": "per-sequence mean",
            "clip": "none" if s.clip is None else f"{s.clip:g} per entry of the vocabulary",
        }


def build(settings: Settings) -> Method:
    """The method with these settings."""
    if settings.clip is not None and settings.top_k is not None:
        raise UserError("method.clip is for the full vocabulary; set method.top_k=null with it.")
    if settings.clip is None and settings.temperature != 1.0:
        raise UserError("method.temperature belongs to the clipped divergence; set method.clip with it.")
    return OPSD(
        outputs=("divergence",),
        scorers={"teacher": Scorer(settings.teacher_view, settings.teacher, settings.teacher_rate)},
        least_vocabulary=settings.top_k or 1,
        settings=settings,
    )
