"""The passes over the vocabulary of `vopd.divergence` as Triton kernels: each reads its logits once.

The formulas stay there; here are the sums they need, the top k and the exponential of a gradient. Nothing waits for
the GPU: equal logits are ordered by keys in which the token's id follows the logit, not by a second look at tied rows.
Triton compiles the kernels for a GPU, or, with TRITON_INTERPRET=1 set before it is imported, runs them with numpy on
CPU tensors.

Shape suffixes: T tokens, V vocabulary, K support, G groups of neighbouring tokens. Logits are float32, keys int64.
Offsets are 64-bit: T x V passes 2^31 at 14,135 tokens of a vocabulary of 151,936.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Constants of the kernels. Beside the largest logit of its lane, an entry further down than _FAR weighs 0.
_NEG_INF = tl.constexpr(float("-inf"))
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_FAR = tl.constexpr(1e30)
_LAST_ID = tl.constexpr(2**31 - 1)

_GROUP = 32  # tokens of a group; the least work for k = 100 of 152k is near sqrt(V / k)
_GROUPS = 128  # groups that one program looks at
_BLOCK = 2048  # tokens that one program works on at once: two programs a multiprocessor, by their registers

Sums = tuple[Tensor, Tensor, Tensor]


def top_k(logits_TV: Tensor, k: int) -> Tensor | None:
    """Ids (T, K) of the k largest logits, the lower id first among equals; None where groups do not pay.

    The k largest are in the k groups with the largest maxima (among equals the first groups): one pass finds the
    maxima, and torch.topk sees them and the k groups, not the vocabulary.
    """
    rows, vocabulary = logits_TV.shape
    if 4 * k * _GROUP >= vocabulary:
        return None
    logits_TV, groups = logits_TV.contiguous(), triton.cdiv(vocabulary, _GROUP)
    maxima_TG = logits_TV.new_empty(rows, groups, dtype=torch.int64)
    candidates_TV = logits_TV.new_empty(rows, k * _GROUP, dtype=torch.int64)
    with torch.cuda.device_of(logits_TV):
        _group_keys[(rows, triton.cdiv(groups, _GROUPS))](
            logits_TV, maxima_TG, vocabulary, groups, GROUPS=_GROUPS, GROUP=_GROUP, num_warps=8
        )
        chosen_TK = maxima_TG.topk(k, dim=-1, sorted=False).values
        _candidate_keys[(rows, triton.cdiv(k, _GROUPS))](
            logits_TV, chosen_TK, candidates_TV, vocabulary, k, GROUPS=_GROUPS, GROUP=_GROUP, num_warps=8
        )
    keys_TK = candidates_TV.topk(k, dim=-1, sorted=False).values
    return ~keys_TK & _LAST_ID.value


def tails(student_TV: Tensor, teacher_TV: Tensor, support_TK: Tensor) -> tuple[Sums, Sums]:
    """Largest logit m, sum of e^(z-m) and sum of e^(z-m)(z-m), each (T, 1), of both outside the support.

    The support is the student's top k, the lower id first among equals. Where no logit is left the sums are 0.
    """
    rows, vocabulary = student_TV.shape
    student_TV, teacher_TV = student_TV.contiguous(), teacher_TV.contiguous()
    logits_TK = student_TV.gather(-1, support_TK)
    threshold_T1 = logits_TK.amin(-1, keepdim=True)
    last_T1 = support_TK.masked_fill(logits_TK != threshold_T1, -1).amax(-1, keepdim=True)
    sums = student_TV.new_empty(6, rows, 1)
    with torch.cuda.device_of(student_TV):
        _tail_sums[(rows,)](
            student_TV, teacher_TV, threshold_T1, last_T1, sums, rows, vocabulary, BLOCK=_BLOCK, num_warps=8
        )
    return tuple(sums[:3]), tuple(sums[3:])


def whole(logits_TV: Tensor) -> Sums:
    """The three sums of `tails` over all logits."""
    rows, vocabulary = logits_TV.shape
    sums = logits_TV.new_empty(3, rows, 1)
    with torch.cuda.device_of(logits_TV):
        _whole_sums[(rows,)](logits_TV.contiguous(), sums, rows, vocabulary, BLOCK=_BLOCK, num_warps=8)
    return tuple(sums)


def scaled_exp(logits_TV: Tensor, shift_T1: Tensor, factor_T1: Tensor) -> Tensor:
    """factor * e^(z - shift), a new (T, V): one read, one write."""
    rows, vocabulary = logits_TV.shape
    logits_TV = logits_TV.contiguous()
    result_TV = torch.empty_like(logits_TV)
    with torch.cuda.device_of(logits_TV):
        _scaled_exp[(rows, triton.cdiv(vocabulary, _BLOCK))](
            logits_TV,
            shift_T1.contiguous(),
            factor_T1.contiguous(),
            result_TV,
            vocabulary,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return result_TV


@triton.jit
def _key(logit: tl.tensor, position: tl.tensor) -> tl.tensor:
    """An int64 that is larger for a larger float32, and among equals (-0.0 is 0.0) for a lower position."""
    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & _LAST_ID)
    return (ordered.to(tl.int64) << 32) | (~position & _LAST_ID).to(tl.int64)


@triton.jit
def _group_keys(
    logits_TV: tl.tensor,
    keys_TG: tl.tensor,
    vocabulary: tl.tensor,
    groups: tl.tensor,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Of each group the key of its largest logit and its number."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    logit = tl.load(logits_TV + row * vocabulary + token, mask=token < vocabulary, other=_NEG_INF)
    tl.store(keys_TG + row * groups + group, _key(tl.max(logit, axis=1), group), mask=group < groups)


@triton.jit
def _candidate_keys(
    logits_TV: tl.tensor,
    chosen_TK: tl.tensor,
    keys_TV: tl.tensor,
    vocabulary: tl.tensor,
    k: tl.tensor,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """The keys of all tokens of the chosen groups. Those behind the vocabulary's end come after every token in it."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    chosen = tl.load(chosen_TK + row * k + place, mask=place < k, other=0)
    group = (~chosen & _LAST_ID).to(tl.int32)
    inner = tl.arange(0, GROUP)[None, :]
    token = group[:, None] * GROUP + inner
    inside = (place < k)[:, None]
    logit = tl.load(logits_TV + row * vocabulary + token, mask=inside & (token < vocabulary), other=_NEG_INF)
    tl.store(keys_TV + (row * k + place[:, None]) * GROUP + inner, _key(logit, token), mask=inside)


@triton.jit
def _add(logit: tl.tensor, largest: tl.tensor, total: tl.tensor, moment: tl.tensor) -> tl.tensor:
    """One more logit for the sums of each lane, in one exponential; -inf adds nothing."""
    higher = logit > largest
    distance = tl.abs(logit - largest)
    distance = tl.where(distance > _FAR, _FAR, distance)  # a minimum would lose a NaN
    scale = tl.exp(-distance)
    moment = tl.where(higher, (moment - distance * total) * scale, moment - distance * scale)
    total = tl.where(higher, total * scale + 1.0, total + scale)
    return tl.where(higher, logit, largest), total, moment


@triton.jit
def _store_sums(
    largest: tl.tensor, total: tl.tensor, moment: tl.tensor, sums: tl.tensor, rows: tl.tensor
) -> None:
    """The sums of all lanes together, to sums[0], sums[rows] and sums[2 rows]."""
    overall = tl.max(largest, axis=0)
    shift = tl.where(total == 0.0, 0.0, largest - overall)
    scale = tl.exp(shift)
    tl.store(sums, overall)
    tl.store(sums + rows, tl.sum(total * scale, axis=0))
    tl.store(sums + 2 * rows, tl.sum((moment + shift * total) * scale, axis=0))


@triton.jit
def _tail_sums(
    student_TV: tl.tensor,
    teacher_TV: tl.tensor,
    threshold_T1: tl.tensor,
    last_T1: tl.tensor,
    sums: tl.tensor,
    rows: tl.tensor,
    vocabulary: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """A row: in the support are student's logits above the threshold, and those at it up to the id `last`."""
    row = tl.program_id(0).to(tl.int64)
    threshold, last = tl.load(threshold_T1 + row), tl.load(last_T1 + row)
    empty = tl.zeros([BLOCK], dtype=tl.float32)
    student_largest, student_total, student_moment = empty + _LOWEST, empty, empty
    teacher_largest, teacher_total, teacher_moment = empty + _LOWEST, empty, empty
    for start in tl.range(0, vocabulary, BLOCK, num_stages=3):
        token = start + tl.arange(0, BLOCK)
        inside = token < vocabulary
        student = tl.load(student_TV + row * vocabulary + token, mask=inside, other=_NEG_INF)
        teacher = tl.load(teacher_TV + row * vocabulary + token, mask=inside, other=_NEG_INF)
        supported = (student > threshold) | ((student == threshold) & (token <= last))
        student_largest, student_total, student_moment = _add(
            tl.where(supported, _NEG_INF, student), student_largest, student_total, student_moment
        )
        teacher_largest, teacher_total, teacher_moment = _add(
            tl.where(supported, _NEG_INF, teacher), teacher_largest, teacher_total, teacher_moment
        )
    _store_sums(student_largest, student_total, student_moment, sums + row, rows)
    _store_sums(teacher_largest, teacher_total, teacher_moment, sums + 3 * rows + row, rows)


@triton.jit
def _whole_sums(
    logits_TV: tl.tensor, sums: tl.tensor, rows: tl.tensor, vocabulary: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """A row, without a support."""
    row = tl.program_id(0).to(tl.int64)
    empty = tl.zeros([BLOCK], dtype=tl.float32)
    largest, total, moment = empty + _LOWEST, empty, empty
    for start in tl.range(0, vocabulary, BLOCK, num_stages=3):
        token = start + tl.arange(0, BLOCK)
        logit = tl.load(logits_TV + row * vocabulary + token, mask=token < vocabulary, other=_NEG_INF)
        largest, total, moment = _add(logit, largest, total, moment)
    _store_sums(largest, total, moment, sums + row, rows)


@triton.jit
def _scaled_exp(
    logits_TV: tl.tensor,
    shift_T1: tl.tensor,
    factor_T1: tl.tensor,
    result_TV: tl.tensor,
    vocabulary: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """A block of a row."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    shift, factor = tl.load(shift_T1 + row), tl.load(factor_T1 + row)
    logit = tl.load(logits_TV + row * vocabulary + token, mask=token < vocabulary, other=_NEG_INF)
    tl.store(result_TV + row * vocabulary + token, tl.exp(logit - shift) * factor, mask=token < vocabulary)
