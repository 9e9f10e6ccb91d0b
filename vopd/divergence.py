"""Divergences between two next-token distributions, per token, in plain torch.

Every distillation method compares a teacher with the student at each response token; what differs is
the direction (beta) and the support (the student's top k, or the whole vocabulary). The gradient of
top_k_tail_divergence is a closed form rather than autograd's: its backward makes one (T, V) tensor
instead of one per step of the formula.

Shape suffixes: T tokens, V vocabulary, K support (the chosen tokens), B buckets (K + 1 with a tail,
V without). All inputs are float32 or float64; all results are in nats, one number per token.

Sources: generalised JSD and top-k + tail, Vision-OPD (arXiv 2605.18740); pointwise clip, OPSD (arXiv
2601.18734).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_NEG_INF = float("-inf")


class TopKTailDivergence(NamedTuple):
    """Per-token divergence and, for logging, how much of each distribution the support holds."""

    divergence_T: Tensor
    student_mass_T: Tensor
    teacher_mass_T: Tensor


def student_top_k(student_logits_TV: Tensor, k: int) -> Tensor:
    """Token ids (T, K) of the student's k most probable tokens; equal logits go to the lower id.

    The choice carries no gradient. Raises ValueError if k is not in 1..V.
    """
    vocabulary = student_logits_TV.shape[-1]
    if not 1 <= k <= vocabulary:
        raise ValueError(
            f"top-k of k={k} does not fit a vocabulary of V={vocabulary}: choose k from 1 to {vocabulary}."
        )
    logits_TV = student_logits_TV.detach()
    ids_V = torch.arange(vocabulary, device=logits_TV.device, dtype=torch.int32)
    if k == vocabulary:
        return ids_V.long().expand(logits_TV.shape)
    top = logits_TV.topk(k, dim=-1)
    threshold_T1 = top.values[:, -1:]
    # topk breaks ties at the threshold as it likes, differently by device: refill them by lowest id.
    above_T1 = (top.values > threshold_T1).sum(-1, keepdim=True)
    rank_TV = torch.where(logits_TV == threshold_T1, -ids_V, -vocabulary - ids_V)
    tied_TK = rank_TV.topk(k, dim=-1).indices
    place_K = torch.arange(k, device=logits_TV.device)
    refill_TK = tied_TK.gather(-1, (place_K - above_T1).clamp(min=0))
    return torch.where(place_K < above_T1, top.indices, refill_TK)


def bucketed_log_probs(logits_TV: Tensor, support_TK: Tensor) -> Tensor:
    """Log-probabilities (T, K+1) of the support tokens and, last, of all other tokens together (the tail).

    Normalised over the full vocabulary. The tail is the logsumexp of the other logits, so a tail of mass
    1e-12 is exact where log(1 - sum) has lost it. Without other tokens (K = V) the tail is -inf and
    carries no gradient.
    """
    _require_full_precision(logits_TV)
    log_tail_T1 = _log_tail_sum(logits_TV, support_TK)
    return _normalised_buckets(logits_TV, support_TK, log_tail_T1)


def divergence_name(beta: float) -> str:
    """What a table calls the divergence with this beta."""
    return {0.0: "forward KL", 1.0: "reverse KL"}.get(beta, f"JSD {beta}")


def divergence(teacher_log_probs_TB: Tensor, student_log_probs_TB: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence per token (T,), summed over the buckets.

    beta in (0, 1): beta KL(teacher||M) + (1-beta) KL(student||M), M = beta teacher + (1-beta) student.
    beta = 0 selects KL(teacher||student), beta = 1 KL(student||teacher): the JSD itself is 0 there.
    Buckets of probability 0 (log-probability -inf) count 0. Differentiable in both arguments: detach the
    teacher.
    Raises ValueError if beta is outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(
            f"beta={beta} is outside [0, 1]: 0 is forward KL, 1 reverse KL, between them the JSD."
        )
    if beta == 0.0:
        return _kl(teacher_log_probs_TB, student_log_probs_TB)
    if beta == 1.0:
        return _kl(student_log_probs_TB, teacher_log_probs_TB)
    teacher_over_m_TB, student_over_m_TB = _log_ratios_to_mixture(
        teacher_log_probs_TB, student_log_probs_TB, beta
    )
    teacher_part_TB = beta * teacher_log_probs_TB.exp() * teacher_over_m_TB
    student_part_TB = (1.0 - beta) * student_log_probs_TB.exp() * student_over_m_TB
    return (teacher_part_TB + student_part_TB).sum(-1)


def top_k_tail_divergence(
    student_logits_TV: Tensor, teacher_logits_TV: Tensor, k: int | None, beta: float
) -> TopKTailDivergence:
    """Divergence over the student's top k plus one tail bucket; k=None takes the whole vocabulary.

    The gradient reaches the student's logits only, by the closed form: with student buckets q_i and
    g_i = dD/dq_i, gbar = sum_i q_i g_i,
    dD/dz = (g_tail - gbar) softmax(z) + sum_{j in support} p_j (g_j - g_tail) e_j.
    The support is chosen from these very logits and carries no gradient. Top-k + tail is a lower bound of
    the full divergence and grows with k. Masses (T,) are in [0, 1], detached.
    Raises ValueError for k > V, beta outside [0, 1], or logits in half precision.
    """
    _require_full_precision(student_logits_TV, teacher_logits_TV)
    if k is None:
        divergence_T = _FullDivergence.apply(student_logits_TV, teacher_logits_TV, beta)
        ones_T = torch.ones_like(divergence_T)
        return TopKTailDivergence(divergence_T, ones_T, ones_T)
    support_TK = student_top_k(student_logits_TV, k)
    return TopKTailDivergence(
        *_TopKTailDivergence.apply(student_logits_TV, teacher_logits_TV, support_TK, beta)
    )


def pointwise_forward_kl(student_logits_TV: Tensor, teacher_logits_TV: Tensor, clip: float) -> Tensor:
    """sum_v min(p_T(v) log(p_T(v) / p_S(v)), clip) per token (T,), over the full vocabulary (OPSD).

    Entries at the clip carry no gradient; clip=inf is the forward KL. The teacher carries none.
    """
    _require_full_precision(student_logits_TV, teacher_logits_TV)
    teacher_log_probs_TV = teacher_logits_TV.detach().log_softmax(-1)
    terms_TV = _kl_terms(teacher_log_probs_TV, student_logits_TV.log_softmax(-1))
    return terms_TV.clamp(max=clip).sum(-1)


def sampled_token_log_prob(logits_TV: Tensor, token_T: Tensor) -> Tensor:
    """Log-probability (T,) of the sampled token under softmax(logits), temperature 1."""
    _require_full_precision(logits_TV)
    return logits_TV.gather(-1, token_T.unsqueeze(-1)).squeeze(-1) - logits_TV.logsumexp(-1)


def entropy(logits_TV: Tensor) -> Tensor:
    """Entropy (T,) of softmax(logits), from 0 to log V."""
    _require_full_precision(logits_TV)
    log_probs_TV = logits_TV.log_softmax(-1)
    return -(log_probs_TV.exp() * log_probs_TV.masked_fill(log_probs_TV == _NEG_INF, 0.0)).sum(-1)


def _log_tail_sum(logits_TV: Tensor, support_TK: Tensor) -> Tensor:
    """logsumexp (T, 1) of the logits outside the support; -inf, without gradient, where there are none."""
    return logits_TV.scatter(-1, support_TK, _NEG_INF).logsumexp(-1, keepdim=True)


def _normalised_buckets(logits_TV: Tensor, support_TK: Tensor, log_tail_T1: Tensor) -> Tensor:
    bucket_logits_TB = torch.cat([logits_TV.gather(-1, support_TK), log_tail_T1], dim=-1)
    return bucket_logits_TB - logits_TV.logsumexp(-1, keepdim=True)


def _require_full_precision(*logits: Tensor) -> None:
    for tensor in logits:
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"logits are {tensor.dtype}, whose rounding drowns the divergence: project in float32."
            )


def _kl_terms(p_log_probs_TB: Tensor, q_log_probs_TB: Tensor) -> Tensor:
    log_ratio_TB = (p_log_probs_TB - q_log_probs_TB).masked_fill(p_log_probs_TB == _NEG_INF, 0.0)
    return p_log_probs_TB.exp() * log_ratio_TB


def _kl(p_log_probs_TB: Tensor, q_log_probs_TB: Tensor) -> Tensor:
    return _kl_terms(p_log_probs_TB, q_log_probs_TB).sum(-1)


def _log_ratios_to_mixture(teacher_TB: Tensor, student_TB: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(teacher/M) and log(student/M): exactly 0 where teacher = student, 0 where their bucket is empty.

    With r = log(teacher/student): log(student/M) = -log(1 + beta (e^r - 1)) and
    log(teacher/M) = -log(1 + (1-beta) (e^-r - 1)). Each is used on the side of r on which its
    exponential cannot overflow, and gives the other by adding or subtracting r.
    """
    teacher_empty_TB, student_empty_TB = teacher_TB == _NEG_INF, student_TB == _NEG_INF
    r_TB = (teacher_TB - student_TB).masked_fill(teacher_empty_TB & student_empty_TB, 0.0)
    positive_TB = r_TB > 0
    zero = torch.zeros((), dtype=r_TB.dtype, device=r_TB.device)
    share_TB = torch.where(positive_TB, zero + (1.0 - beta), zero + beta)
    shrunk_TB = -torch.log1p(share_TB * torch.expm1(torch.where(positive_TB, -r_TB, r_TB)))
    teacher_over_m_TB = shrunk_TB + torch.where(positive_TB, zero, r_TB)
    student_over_m_TB = shrunk_TB - torch.where(positive_TB, r_TB, zero)
    return (
        teacher_over_m_TB.masked_fill(teacher_empty_TB, 0.0),
        student_over_m_TB.masked_fill(student_empty_TB, 0.0),
    )


def _bucket_gradient(teacher_TB: Tensor, student_TB: Tensor, beta: float) -> Tensor:
    """q_i (g_i - gbar): the gradient of the divergence in the logit of each bucket, as if it were one token.

    Written with the products q_i g_i, which stay bounded where g_i = -t_i/q_i alone would overflow.
    """
    if beta == 0.0:
        weighted_TB = -teacher_TB.exp()
    elif beta == 1.0:
        weighted_TB = _kl_terms(student_TB, teacher_TB)
    else:
        _, student_over_m_TB = _log_ratios_to_mixture(teacher_TB, student_TB, beta)
        weighted_TB = (1.0 - beta) * student_TB.exp() * student_over_m_TB
    return weighted_TB - student_TB.exp() * weighted_TB.sum(-1, keepdim=True)


class _FullDivergence(torch.autograd.Function):
    """Divergence over the whole vocabulary; saves the two log-probabilities and nothing between."""

    @staticmethod
    def forward(ctx: Any, student_logits_TV: Tensor, teacher_logits_TV: Tensor, beta: float) -> Tensor:
        student_TV, teacher_TV = student_logits_TV.log_softmax(-1), teacher_logits_TV.log_softmax(-1)
        ctx.save_for_backward(student_TV, teacher_TV)
        ctx.beta = beta
        return divergence(teacher_TV, student_TV, beta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None]:
        student_TV, teacher_TV = ctx.saved_tensors
        return _bucket_gradient(teacher_TV, student_TV, ctx.beta).mul_(grad_T.unsqueeze(-1)), None, None


class _TopKTailDivergence(torch.autograd.Function):
    """Divergence over support + tail; the backward spreads the tail's gradient over the tokens in it."""

    @staticmethod
    def forward(
        ctx: Any, student_logits_TV: Tensor, teacher_logits_TV: Tensor, support_TK: Tensor, beta: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_tail_T1 = _log_tail_sum(student_logits_TV, support_TK)
        student_TB = _normalised_buckets(student_logits_TV, support_TK, log_tail_T1)
        teacher_TB = bucketed_log_probs(teacher_logits_TV, support_TK)
        ctx.save_for_backward(student_logits_TV, support_TK, log_tail_T1, student_TB, teacher_TB)
        ctx.beta = beta
        student_mass_T, teacher_mass_T = student_TB[:, :-1].exp().sum(-1), teacher_TB[:, :-1].exp().sum(-1)
        ctx.mark_non_differentiable(student_mass_T, teacher_mass_T)
        return divergence(teacher_TB, student_TB, beta), student_mass_T, teacher_mass_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor, *_mass_grads: Tensor) -> tuple[Tensor, None, None, None]:
        student_logits_TV, support_TK, log_tail_T1, student_TB, teacher_TB = ctx.saved_tensors
        bucket_grad_TB = _bucket_gradient(teacher_TB, student_TB, ctx.beta) * grad_T.unsqueeze(-1)
        # Each tail token takes its share p_v / q_tail = exp(z_v - log tail sum) of the tail's gradient. An
        # empty tail has no token to take any: subtracting +inf makes every share exp(-inf) = 0.
        log_tail_T1 = log_tail_T1.masked_fill(log_tail_T1 == _NEG_INF, float("inf"))
        # The support's entries may overflow here; they are overwritten.
        share_TV = (student_logits_TV - log_tail_T1).exp_()
        grad_TV = share_TV.mul_(bucket_grad_TB[:, -1:]).scatter_(-1, support_TK, bucket_grad_TB[:, :-1])
        return grad_TV, None, None, None
