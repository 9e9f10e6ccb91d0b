"""Divergences between two next-token distributions, per token, in plain torch.

Every distillation method compares a teacher with the student at each response token; what differs is
the direction (beta) and the support (the student's top k, or the whole vocabulary). Gradients are closed
forms rather than autograd's: a backward makes one (T, V) tensor instead of one per step of the formula, and
all that it keeps of the forward, beside the logits, is one bucket or number per token. What is made on the way
is made for a few rows at a time: on a CPU it then stays in the cache. On CUDA the passes over the vocabulary for
top k + tail, sampled tokens and entropy are kernels (`vopd/divergence_triton.py`); plain torch is their reference.

Shape suffixes: T tokens, V vocabulary, K support (the chosen tokens), B buckets (K + 1 with a tail,
V without). All inputs are float32 or float64; all results are in nats, one number per token.

Sources: generalised JSD and top-k + tail, Vision-OPD (arXiv 2605.18740); pointwise clip, OPSD (arXiv
2601.18734).
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_NEG_INF = float("-inf")
# Entries of (rows, V) that are worked on at once: 2 MiB of float32 on a CPU, 256 MiB where a launch must be worth it.
_ENTRIES = {"cpu": 2**19}
_MOST_ENTRIES = 2**26


class TopKTailDivergence(NamedTuple):
    """Per-token divergence, and by-products of the same pass over the logits, detached.

    Masses are how much of each distribution the support holds; entropy and log normaliser (the logsumexp of the
    logits) are the student's.
    """

    divergence_T: Tensor
    student_mass_T: Tensor
    teacher_mass_T: Tensor
    entropy_T: Tensor
    log_normaliser_T: Tensor

    def log_prob(self, student_logits_TV: Tensor, token_T: Tensor) -> Tensor:
        """The student's log-probability (T,) of the sampled token, without gradient."""
        return _at(student_logits_TV.detach(), token_T) - self.log_normaliser_T


def student_top_k(student_logits_TV: Tensor, k: int) -> Tensor:
    """Token ids (T, K) of the student's k most probable tokens; equal logits go to the lower id.

    The choice carries no gradient. Raises ValueError if k is not in 1..V.
    """
    logits_TV = student_logits_TV.detach()
    _require_fit(logits_TV, k)
    return _top_k(_kernels(logits_TV), logits_TV, k)


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
    the full divergence and grows with k. Masses (T,) are in [0, 1].
    Raises ValueError for k > V, beta outside [0, 1], or logits in half precision.
    """
    _require_full_precision(student_logits_TV, teacher_logits_TV)
    if k is None:
        divergence_T, *rest = _FullDivergence.apply(student_logits_TV, teacher_logits_TV, beta)
        ones_T = torch.ones_like(rest[0])
        return TopKTailDivergence(divergence_T, ones_T, ones_T, *rest)
    return TopKTailDivergence(*_TopKTailDivergence.apply(student_logits_TV, teacher_logits_TV, k, beta))


def pointwise_forward_kl(
    student_logits_TV: Tensor, teacher_logits_TV: Tensor, clip: float, temperature: float = 1.0
) -> Tensor:
    """sum_v min(p_T(v) log(p_T(v) / p_S(v)), clip) per token (T,), over the full vocabulary (OPSD).

    Entries at the clip carry no gradient; clip=inf is the forward KL. The teacher carries none. Both p are
    softmax(logits / temperature); the value is not multiplied by temperature^2.
    """
    _require_full_precision(student_logits_TV, teacher_logits_TV)
    value_T: Tensor = _PointwiseForwardKL.apply(student_logits_TV, teacher_logits_TV, clip, temperature)
    return value_T


def sampled_token_log_prob(logits_TV: Tensor, token_T: Tensor) -> Tensor:
    """Log-probability (T,) of the sampled token under softmax(logits), temperature 1."""
    _require_full_precision(logits_TV)
    log_prob_T: Tensor = _SampledTokenLogProb.apply(logits_TV, token_T)
    return log_prob_T


def entropy(logits_TV: Tensor) -> Tensor:
    """Entropy (T,) of softmax(logits), from 0 to log V."""
    _require_full_precision(logits_TV)
    if torch.is_grad_enabled() and logits_TV.requires_grad:
        return _entropy(_log_probs(logits_TV)[0])
    if kernels := _kernels(logits_TV):
        _, sum_T1, moment_T1 = kernels.whole(logits_TV.detach())
        return (sum_T1.log() - moment_T1 / sum_T1)[:, 0]
    return torch.cat([_entropy(_log_probs(logits_TV[rows])[0]) for rows in _few_rows(logits_TV)])


def _kernels(logits_TV: Tensor, *others: Tensor) -> ModuleType | None:
    """`vopd.divergence_triton` where it works on these logits; None where plain torch does.

    It does on CUDA, or under Triton's interpreter, on float32 logits of one shape. float64 stays the reference.
    """
    if not logits_TV.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    kinds = {(x.shape, x.dtype, x.device) for x in (logits_TV, *others)}
    return _imported_kernels() if len(kinds) == 1 and logits_TV.dtype == torch.float32 else None


@functools.cache
def _imported_kernels() -> ModuleType | None:
    try:
        from vopd import divergence_triton
    except ImportError as error:
        logging.getLogger(__name__).warning(
            "Triton cannot be imported (%s): divergences on the GPU run in plain torch, to the same results, slower.",
            error,
        )
        return None
    return divergence_triton


def _few_rows(logits_TV: Tensor) -> Iterator[slice]:
    """All rows in slices, at least one, of as many as are worked on at once."""
    rows, vocabulary = logits_TV.shape
    at_once = max(1, _ENTRIES.get(logits_TV.device.type, _MOST_ENTRIES) // max(vocabulary, 1))
    for start in range(0, max(rows, 1), at_once):
        yield slice(start, min(start + at_once, rows))


def _at(logits_TV: Tensor, token_T: Tensor) -> Tensor:
    return logits_TV.gather(-1, token_T.unsqueeze(-1)).squeeze(-1)


def _log_probs(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (T, V) and log normaliser (T, 1).

    Not by `log_softmax`: on a CPU its sum over 152k tokens in float32 is 2e-5 off, that of `logsumexp` 1e-7.
    """
    log_normaliser_T1 = logits_TV.logsumexp(-1, keepdim=True)
    return logits_TV - log_normaliser_T1, log_normaliser_T1


def _tempered(logits_TV: Tensor, temperature: float) -> Tensor:
    return logits_TV if temperature == 1.0 else logits_TV / temperature


def _entropy(log_probs_TV: Tensor) -> Tensor:
    return -(log_probs_TV.exp() * log_probs_TV.masked_fill(log_probs_TV == _NEG_INF, 0.0)).sum(-1)


def _require_fit(logits_TV: Tensor, k: int) -> None:
    vocabulary = logits_TV.shape[-1]
    if not 1 <= k <= vocabulary:
        raise ValueError(
            f"top-k of k={k} does not fit a vocabulary of V={vocabulary}: choose k from 1 to {vocabulary}."
        )


def _top_k(kernels: ModuleType | None, logits_TV: Tensor, k: int) -> Tensor:
    support_TK = kernels.top_k(logits_TV, k) if kernels else None
    return _support(logits_TV, k)[0] if support_TK is None else support_TK


def _support(logits_TV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids (T, K) of the k largest logits, the lower id first among equals, and the largest logit outside (T, 1)."""
    vocabulary = logits_TV.shape[-1]
    if k == vocabulary:
        ids_TV = torch.arange(vocabulary, device=logits_TV.device).expand(logits_TV.shape)
        return ids_TV, logits_TV.new_full((len(logits_TV), 1), _NEG_INF)
    top = logits_TV.topk(k + 1, dim=-1)
    ids_TK, outside_T1 = top.indices[:, :k].clone(), top.values[:, k:]
    tied_T = top.values[:, k - 1] == outside_T1[:, 0]
    if bool(tied_T.any()):
        # topk breaks ties at the threshold as it likes, differently by device: refill them by lowest id.
        ids_TK[tied_T] = _refilled(logits_TV[tied_T], ids_TK[tied_T], outside_T1[tied_T])
    return ids_TK, outside_T1


def _refilled(logits_TV: Tensor, ids_TK: Tensor, threshold_T1: Tensor) -> Tensor:
    """The ids above the threshold, and as many of the lowest at it as there is room for."""
    (_, vocabulary), k = logits_TV.shape, ids_TK.shape[-1]
    ids_V = torch.arange(vocabulary, device=logits_TV.device, dtype=torch.int32)
    rank_TV = torch.where(logits_TV == threshold_T1, -ids_V, -vocabulary - ids_V)
    tied_TK = rank_TV.topk(k, dim=-1).indices
    above_T1 = (logits_TV.gather(-1, ids_TK) > threshold_T1).sum(-1, keepdim=True)
    place_K = torch.arange(k, device=logits_TV.device)
    refill_TK = tied_TK.gather(-1, (place_K - above_T1).clamp(min=0))
    return torch.where(place_K < above_T1, ids_TK, refill_TK)


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
    """KL(p||q) (T,), never negative: the sum of p (r + e^-r - 1) with r = log(p/q).

    Adding q - p, which sums to 0, to each term p r makes all of them positive. Near agreement the plain terms cancel in
    the sum, and an error of the normalisers, 1e-7 in float32, is as large as the KL.
    """
    empty_TB = p_log_probs_TB == _NEG_INF
    r_TB = (p_log_probs_TB - q_log_probs_TB).masked_fill(empty_TB, 0.0)
    p_TB = p_log_probs_TB.exp()
    near_TB = (r_TB.abs() < 1.0) & ~empty_TB
    near_r_TB = r_TB.masked_fill(~near_TB, 0.0)
    near_terms_TB = p_TB * (near_r_TB + torch.expm1(-near_r_TB)).clamp(min=0.0)
    return torch.where(near_TB, near_terms_TB, p_TB * r_TB + q_log_probs_TB.exp() - p_TB).sum(-1)


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


class _Buckets(NamedTuple):
    """One distribution over support and tail, and by-products of the same pass."""

    log_probs_TB: Tensor
    log_tail_T1: Tensor
    entropy_T: Tensor
    log_normaliser_T: Tensor


class _Sums(NamedTuple):
    """The tail's m, sum of e^(z-m) and sum of e^(z-m)(z-m), for some m near its largest logit; 0 without a tail."""

    largest_T1: Tensor
    sum_T1: Tensor
    moment_T1: Tensor


def _tail_sums(logits_TV: Tensor, support_TK: Tensor, outside_T1: Tensor) -> _Sums:
    """In one exponential; outside_T1 is the largest logit outside the support."""
    largest_T1 = outside_T1.masked_fill(outside_T1 == _NEG_INF, 0.0)
    above_TV = logits_TV - largest_T1
    # In the support the exponential may overflow; it does not count.
    weight_TV = above_TV.exp().scatter_(-1, support_TK, 0.0)
    sum_T1 = weight_TV.sum(-1, keepdim=True)
    # 0 * -inf counts 0.
    above_TV.clamp_(min=torch.finfo(logits_TV.dtype).min)
    return _Sums(largest_T1, sum_T1, above_TV.mul_(weight_TV).sum(-1, keepdim=True))


def _buckets(support_logits_TK: Tensor, tail: _Sums) -> _Buckets:
    """As `bucketed_log_probs`."""
    largest_T1, sum_T1, moment_T1 = tail
    log_tail_T1 = sum_T1.log() + largest_T1
    log_normaliser_T1 = torch.logaddexp(support_logits_TK.logsumexp(-1, keepdim=True), log_tail_T1)
    log_probs_TB = torch.cat([support_logits_TK, log_tail_T1], -1) - log_normaliser_T1
    # The tail's share of sum p log p: its mass times the mean log-probability in it.
    tail_T1 = log_probs_TB[:, -1:].exp() * (moment_T1 / sum_T1 + largest_T1 - log_normaliser_T1)
    support_TK1 = log_probs_TB[:, :-1]
    inside_T = (support_TK1.exp() * support_TK1.clamp(min=torch.finfo(log_tail_T1.dtype).min)).sum(-1)
    entropy_T = -(inside_T + tail_T1.masked_fill(sum_T1 == 0.0, 0.0)[:, 0])
    return _Buckets(log_probs_TB, log_tail_T1, entropy_T, log_normaliser_T1[:, 0])


class _TopKTailDivergence(torch.autograd.Function):
    """Divergence over support + tail; the backward spreads the tail's gradient over the tokens in it."""

    @staticmethod
    def forward(
        ctx: Any, student_logits_TV: Tensor, teacher_logits_TV: Tensor, k: int, beta: float
    ) -> tuple[Tensor, ...]:
        _require_fit(student_logits_TV, k)
        kernels = _kernels(student_logits_TV, teacher_logits_TV)
        parts = [
            _top_k_tail_rows(kernels, student_logits_TV[rows], teacher_logits_TV[rows], k, beta)
            for rows in ([slice(None)] if kernels else _few_rows(student_logits_TV))
        ]
        *numbers, support_TK, log_tail_T1, gradient_TB = (
            torch.cat(column) for column in zip(*parts, strict=True)
        )
        ctx.save_for_backward(student_logits_TV, support_TK, log_tail_T1, gradient_TB)
        ctx.mark_non_differentiable(*numbers[1:])
        return tuple(numbers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor, *_others: Tensor) -> tuple[Tensor, None, None, None]:
        student_logits_TV, support_TK, log_tail_T1, gradient_TB = ctx.saved_tensors
        bucket_grad_TB = gradient_TB * grad_T.unsqueeze(-1)
        # Each tail token takes its share p_v / q_tail = exp(z_v - log tail sum) of the tail's gradient. An
        # empty tail has no token to take any: subtracting +inf makes every share exp(-inf) = 0.
        log_tail_T1 = log_tail_T1.masked_fill(log_tail_T1 == _NEG_INF, float("inf"))
        if kernels := _kernels(student_logits_TV):
            grad_TV = kernels.scaled_exp(student_logits_TV, log_tail_T1, bucket_grad_TB[:, -1:])
            return grad_TV.scatter_(-1, support_TK, bucket_grad_TB[:, :-1]), None, None, None
        grad_TV = torch.empty_like(student_logits_TV)
        for rows in _few_rows(grad_TV):
            # The support's entries may overflow here; they are overwritten.
            share_TV = torch.sub(student_logits_TV[rows], log_tail_T1[rows], out=grad_TV[rows]).exp_()
            share_TV.mul_(bucket_grad_TB[rows, -1:]).scatter_(-1, support_TK[rows], bucket_grad_TB[rows, :-1])
        return grad_TV, None, None, None


def _top_k_tail_rows(
    kernels: ModuleType | None, student_TV: Tensor, teacher_TV: Tensor, k: int, beta: float
) -> tuple[Tensor, ...]:
    """The numbers of TopKTailDivergence for these rows, then support, log tail sum and bucket gradient."""
    if kernels:
        support_TK = _top_k(kernels, student_TV, k)
        tails = kernels.tails(student_TV, teacher_TV, support_TK)
    else:
        support_TK, outside_T1 = _support(student_TV, k)
        student_tail = _tail_sums(student_TV, support_TK, outside_T1)
        outside_T1 = teacher_TV.scatter(-1, support_TK, _NEG_INF).amax(-1, keepdim=True)
        tails = student_tail, _tail_sums(teacher_TV, support_TK, outside_T1)
    student, teacher = (
        _buckets(logits_TV.gather(-1, support_TK), _Sums(*tail))
        for logits_TV, tail in zip((student_TV, teacher_TV), tails, strict=True)
    )
    student_TB, teacher_TB = student.log_probs_TB, teacher.log_probs_TB
    return (
        divergence(teacher_TB, student_TB, beta),
        student_TB[:, :-1].exp().sum(-1),
        teacher_TB[:, :-1].exp().sum(-1),
        student.entropy_T,
        student.log_normaliser_T,
        support_TK,
        student.log_tail_T1,
        _bucket_gradient(teacher_TB, student_TB, beta),
    )


class _FullDivergence(torch.autograd.Function):
    """Divergence over the whole vocabulary, entropy and log normaliser; keeps the logits and their normalisers."""

    @staticmethod
    def forward(
        ctx: Any, student_logits_TV: Tensor, teacher_logits_TV: Tensor, beta: float
    ) -> tuple[Tensor, ...]:
        parts = []
        for rows in _few_rows(student_logits_TV):
            student_TV, student_normaliser_T1 = _log_probs(student_logits_TV[rows])
            teacher_TV, teacher_normaliser_T1 = _log_probs(teacher_logits_TV[rows])
            numbers = divergence(teacher_TV, student_TV, beta), _entropy(student_TV)
            parts.append((*numbers, student_normaliser_T1, teacher_normaliser_T1))
        divergence_T, entropy_T, *normalisers = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(student_logits_TV, teacher_logits_TV, *normalisers)
        ctx.beta = beta
        log_normaliser_T = normalisers[0][:, 0]
        ctx.mark_non_differentiable(entropy_T, log_normaliser_T)
        return divergence_T, entropy_T, log_normaliser_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor, *_others: Tensor) -> tuple[Tensor, None, None]:
        student_logits_TV, teacher_logits_TV, student_normaliser_T1, teacher_normaliser_T1 = ctx.saved_tensors
        grad_TV = torch.empty_like(student_logits_TV)
        for rows in _few_rows(grad_TV):
            student_TV = student_logits_TV[rows] - student_normaliser_T1[rows]
            teacher_TV = teacher_logits_TV[rows] - teacher_normaliser_T1[rows]
            gradient_TV = _bucket_gradient(teacher_TV, student_TV, ctx.beta)
            torch.mul(gradient_TV, grad_T[rows].unsqueeze(-1), out=grad_TV[rows])
        return grad_TV, None, None


class _PointwiseForwardKL(torch.autograd.Function):
    """The clipped sum; with kept entries c, dD/d(z / temperature) = p_S sum(c p_T) - c p_T. Keeps the logits alone."""

    @staticmethod
    def forward(
        ctx: Any, student_logits_TV: Tensor, teacher_logits_TV: Tensor, clip: float, temperature: float
    ) -> Tensor:
        ctx.save_for_backward(student_logits_TV, teacher_logits_TV)
        ctx.clip, ctx.temperature = clip, temperature
        parts = []
        for rows in _few_rows(student_logits_TV):
            (teacher_TV, _), (student_TV, _) = (
                _log_probs(_tempered(x[rows], temperature)) for x in (teacher_logits_TV, student_logits_TV)
            )
            parts.append(_kl_terms(teacher_TV, student_TV).clamp_(max=clip).sum(-1))
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None, None]:
        student_logits_TV, teacher_logits_TV = ctx.saved_tensors
        upstream_T1 = grad_T.unsqueeze(-1) / ctx.temperature
        grad_TV = torch.empty_like(student_logits_TV)
        for rows in _few_rows(grad_TV):
            (teacher_TV, _), (student_TV, _) = (
                _log_probs(_tempered(x[rows], ctx.temperature))
                for x in (teacher_logits_TV, student_logits_TV)
            )
            clipped_TV = _kl_terms(teacher_TV, student_TV) >= ctx.clip
            kept_TV = teacher_TV.exp_().masked_fill_(clipped_TV, 0.0)
            grad_rows_TV = student_TV.exp_().mul_(kept_TV.sum(-1, keepdim=True)).sub_(kept_TV)
            torch.mul(grad_rows_TV, upstream_T1[rows], out=grad_TV[rows])
        return grad_TV, None, None, None


class _SampledTokenLogProb(torch.autograd.Function):
    """z_y - logsumexp(z), whose gradient is e_y - softmax(z)."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, token_T: Tensor) -> Tensor:
        if kernels := _kernels(logits_TV):
            largest_T1, sum_T1, _ = kernels.whole(logits_TV)
            log_normaliser_T = (sum_T1.log() + largest_T1)[:, 0]
        else:
            log_normaliser_T = torch.cat([logits_TV[rows].logsumexp(-1) for rows in _few_rows(logits_TV)])
        ctx.save_for_backward(logits_TV, token_T, log_normaliser_T)
        return _at(logits_TV, token_T) - log_normaliser_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None]:
        logits_TV, token_T, log_normaliser_T = ctx.saved_tensors
        if kernels := _kernels(logits_TV):
            grad_TV = kernels.scaled_exp(logits_TV, log_normaliser_T.unsqueeze(-1), -grad_T.unsqueeze(-1))
            return grad_TV.scatter_add_(-1, token_T.unsqueeze(-1), grad_T.unsqueeze(-1)), None
        grad_TV = torch.empty_like(logits_TV)
        for rows in _few_rows(grad_TV):
            normaliser_T1, upstream_T1 = log_normaliser_T[rows].unsqueeze(-1), grad_T[rows].unsqueeze(-1)
            probs_TV = torch.sub(logits_TV[rows], normaliser_T1, out=grad_TV[rows]).exp_()
            probs_TV.mul_(-upstream_T1).scatter_add_(-1, token_T[rows].unsqueeze(-1), upstream_T1)
        return grad_TV, None
