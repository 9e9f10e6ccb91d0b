"""The divergences against references written another way: scipy, autograd, central differences.

Checks that a plausible wrong implementation must fail are functions (`_check_...`), so that the wrong
twin can be run through the same check and be seen to fail it.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp, rel_entr, softmax

import vopd.divergence as divergence_module
from vopd.divergence import (
    bucketed_log_probs,
    divergence,
    entropy,
    pointwise_forward_kl,
    sampled_token_log_prob,
    student_top_k,
    top_k_tail_divergence,
)

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
V = 7
KS = (*range(1, V + 1), None)


def _logits(
    seed: int, tokens: int = 5, vocabulary: int = V, scale: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) * scale for _ in range(2)
    )


def _numpy_buckets(probs_V: np.ndarray, support: np.ndarray | None) -> np.ndarray:
    if support is None:
        return probs_V
    outside = np.setdiff1d(np.arange(len(probs_V)), support)
    return np.append(probs_V[support], probs_V[outside].sum())


def _numpy_divergence(
    student_logits_V: np.ndarray, teacher_logits_V: np.ndarray, k: int | None, beta: float
) -> float:
    """Probabilities, explicit sums and scipy's rel_entr; nothing shared with the code under test."""
    student, teacher = softmax(student_logits_V), softmax(teacher_logits_V)
    support = None if k is None else np.argsort(-student_logits_V, kind="stable")[:k]
    s, t = _numpy_buckets(student, support), _numpy_buckets(teacher, support)
    if beta == 0:
        return rel_entr(t, s).sum()
    if beta == 1:
        return rel_entr(s, t).sum()
    m = beta * t + (1 - beta) * s
    return beta * rel_entr(t, m).sum() + (1 - beta) * rel_entr(s, m).sum()


def _reference_gradient(
    student_TV: torch.Tensor, teacher_TV: torch.Tensor, k: int | None, beta: float
) -> torch.Tensor:
    """Autograd through probabilities, support fixed."""
    leaf = student_TV.clone().requires_grad_()
    s, t = leaf.softmax(-1), teacher_TV.softmax(-1)
    if k is not None and k < V:
        order_TV = student_TV.argsort(-1, descending=True)
        s, t = (
            torch.cat(
                [p.gather(-1, order_TV[:, :k]), p.gather(-1, order_TV[:, k:]).sum(-1, keepdim=True)], -1
            )
            for p in (s, t)
        )
    m = beta * t + (1 - beta) * s
    if beta == 0:
        value = _autograd_kl(t, s)
    elif beta == 1:
        value = _autograd_kl(s, t)
    else:
        value = beta * _autograd_kl(t, m) + (1 - beta) * _autograd_kl(s, m)
    return torch.autograd.grad(value, leaf)[0]


def _autograd_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p / q).log()).sum()


def _gradient(student_TV: torch.Tensor, teacher_TV: torch.Tensor, k: int | None, beta: float) -> torch.Tensor:
    leaf = student_TV.clone().requires_grad_()
    top_k_tail_divergence(leaf, teacher_TV, k, beta).divergence_T.sum().backward()
    return leaf.grad


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", KS)
def test_value_equals_scipy_reference(k: int | None, beta: float) -> None:
    student_TV, teacher_TV = _logits(0)
    result = top_k_tail_divergence(student_TV, teacher_TV, k, beta)
    expected = [
        _numpy_divergence(s, t, k, beta) for s, t in zip(student_TV.numpy(), teacher_TV.numpy(), strict=True)
    ]
    np.testing.assert_allclose(result.divergence_T.numpy(), expected, rtol=1e-11)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31 - 1),
    st.floats(0.01, 30.0),
    st.integers(2, 40),
    st.data(),
)
def test_value_masses_and_bounds_on_random_logits(
    seed: int, scale: float, vocabulary: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, vocabulary))
    beta = data.draw(st.sampled_from(BETAS) | st.floats(0.01, 0.99))
    student_TV, teacher_TV = _logits(seed, 3, vocabulary, scale)
    result = top_k_tail_divergence(student_TV, teacher_TV, k, beta)
    torch.testing.assert_close(result.entropy_T, entropy(student_TV), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.log_normaliser_T, student_TV.logsumexp(-1))
    s, t = student_TV.numpy(), teacher_TV.numpy()
    expected = [_numpy_divergence(s[i], t[i], k, beta) for i in range(3)]
    np.testing.assert_allclose(result.divergence_T.numpy(), expected, rtol=1e-8, atol=1e-12)
    for i in range(3):
        support = np.argsort(-s[i], kind="stable")[:k]
        assert result.student_mass_T[i].item() == pytest.approx(softmax(s[i])[support].sum(), abs=1e-12)
        assert result.teacher_mass_T[i].item() == pytest.approx(softmax(t[i])[support].sum(), abs=1e-12)
    full_T = top_k_tail_divergence(student_TV, teacher_TV, None, beta).divergence_T
    assert (result.divergence_T >= -1e-13).all()
    assert (result.divergence_T <= full_T * (1 + 1e-9) + 1e-12).all()


def _check_grows_with_k(values_by_k: list[torch.Tensor], full_T: torch.Tensor) -> None:
    for smaller_T, larger_T in zip(values_by_k, [*values_by_k[1:], full_T], strict=True):
        assert (smaller_T <= larger_T + 1e-12).all()
    torch.testing.assert_close(values_by_k[-1], full_T)


@pytest.mark.parametrize("beta", BETAS)
def test_lower_bound_grows_with_k_up_to_the_full_divergence(beta: float) -> None:
    student_TV, teacher_TV = _logits(1, tokens=20)
    full_T = top_k_tail_divergence(student_TV, teacher_TV, None, beta).divergence_T
    values = [top_k_tail_divergence(student_TV, teacher_TV, k, beta).divergence_T for k in range(1, V + 1)]
    _check_grows_with_k(values, full_T)

    def renormalised(k: int) -> torch.Tensor:
        support_TK = student_top_k(student_TV, k)
        chosen = [x.gather(-1, support_TK).log_softmax(-1) for x in (teacher_TV, student_TV)]
        return divergence(*chosen, beta)

    with pytest.raises(AssertionError):
        _check_grows_with_k([renormalised(k) for k in range(1, V + 1)], full_T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [*BETAS, 1e-3])
@pytest.mark.parametrize("k", KS)
def test_identical_distributions_give_zero_value_and_gradient(
    k: int | None, beta: float, dtype: torch.dtype
) -> None:
    student_TV = _logits(2)[0].to(dtype)
    assert top_k_tail_divergence(student_TV, student_TV.clone(), k, beta).divergence_T.abs().max() == 0
    assert _gradient(student_TV, student_TV.clone(), k, beta).abs().max() <= 4 * torch.finfo(dtype).eps


def test_jsd_over_beta_tends_to_the_kls_and_half_is_symmetric() -> None:
    student_TV, teacher_TV = (x.log_softmax(-1) for x in _logits(3, scale=1.0))
    forward, reverse = divergence(teacher_TV, student_TV, 0.0), divergence(teacher_TV, student_TV, 1.0)
    small = 1e-6
    torch.testing.assert_close(divergence(teacher_TV, student_TV, small) / small, forward, rtol=1e-3, atol=0)
    torch.testing.assert_close(
        divergence(teacher_TV, student_TV, 1 - small) / small, reverse, rtol=1e-3, atol=0
    )
    torch.testing.assert_close(
        divergence(teacher_TV, student_TV, 0.5), divergence(student_TV, teacher_TV, 0.5)
    )
    torch.testing.assert_close(
        divergence(teacher_TV, student_TV, 0.1), divergence(student_TV, teacher_TV, 0.9)
    )
    assert not torch.allclose(forward, reverse)


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", KS)
def test_closed_form_equals_autograd_and_gradcheck(k: int | None, beta: float) -> None:
    student_TV, teacher_TV = _logits(4)
    torch.testing.assert_close(
        _gradient(student_TV, teacher_TV, k, beta),
        _reference_gradient(student_TV, teacher_TV, k, beta),
        rtol=1e-11,
        atol=1e-13,
    )
    torch.autograd.gradcheck(
        lambda z: top_k_tail_divergence(z, teacher_TV, k, beta).divergence_T,
        student_TV.clone().requires_grad_(),
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [1, 3, V - 1, V, None])
def test_closed_form_equals_central_differences_to_1e_10(k: int | None, beta: float) -> None:
    student_TV, teacher_TV = _logits(5, tokens=3)
    gradient_TV = _gradient(student_TV, teacher_TV, k, beta)
    step, stencil = 2e-3, {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}  # sixth order: step^6 is far below 1e-10
    for v in range(V):
        direction_V = torch.zeros(V, dtype=torch.float64)
        direction_V[v] = step
        difference_T = sum(
            weight
            * (
                top_k_tail_divergence(student_TV + n * direction_V, teacher_TV, k, beta).divergence_T
                - top_k_tail_divergence(student_TV - n * direction_V, teacher_TV, k, beta).divergence_T
            )
            for n, weight in stencil.items()
        )
        torch.testing.assert_close(difference_T / step, gradient_TV[:, v], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [2, V])
def test_composed_functions_have_the_same_gradient(k: int, beta: float) -> None:
    """A method may compose top-k, buckets and divergence itself and leave the gradient to autograd."""
    student_TV, teacher_TV = _logits(6)
    leaf = student_TV.clone().requires_grad_()
    support_TK = student_top_k(leaf, k)
    assert not support_TK.requires_grad
    divergence(
        bucketed_log_probs(teacher_TV, support_TK), bucketed_log_probs(leaf, support_TK), beta
    ).sum().backward()
    torch.testing.assert_close(leaf.grad, _gradient(student_TV, teacher_TV, k, beta), rtol=1e-10, atol=1e-13)


def test_gradient_is_weighted_by_the_incoming_one_and_spares_teacher_and_masses() -> None:
    student_TV, teacher_TV = (x.requires_grad_() for x in _logits(7))
    weight_T = torch.tensor([2.0, 0.0, -1.0, 0.5, 3.0], dtype=torch.float64)
    for k in (3, None):
        result = top_k_tail_divergence(student_TV, teacher_TV, k, 0.5)
        assert not result.student_mass_T.requires_grad
        assert not result.teacher_mass_T.requires_grad
        student_TV.grad = None
        (result.divergence_T * weight_T).sum().backward()
        unit_TV = _gradient(student_TV.detach(), teacher_TV.detach(), k, 0.5)
        torch.testing.assert_close(student_TV.grad, unit_TV * weight_T[:, None])
    assert teacher_TV.grad is None
    with torch.no_grad():
        assert not top_k_tail_divergence(student_TV, teacher_TV, 3, 0.5).divergence_T.requires_grad


# --- hard numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [1, 2, V - 1, V, None])
def test_extreme_logits_stay_finite(k: int | None, beta: float, dtype: torch.dtype) -> None:
    row_V = torch.tensor([1e4, -1e4, 0.0, 5.0, -3.0, 9e3, -9e3], dtype=dtype)
    student_TV, teacher_TV = torch.stack([row_V, -row_V, row_V]), torch.stack([-row_V, row_V, row_V])
    result = top_k_tail_divergence(student_TV, teacher_TV, k, beta)
    assert result.divergence_T.isfinite().all()
    assert (result.divergence_T >= 0).all()
    assert _gradient(student_TV, teacher_TV, k, beta).isfinite().all()
    leaf = student_TV.clone().requires_grad_()
    divergence(teacher_TV.log_softmax(-1), leaf.log_softmax(-1), beta).sum().backward()
    assert leaf.grad.isfinite().all()
    if 0 < beta < 1:  # disjoint support: the JSD is the entropy of the mixing coin
        coin = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        torch.testing.assert_close(result.divergence_T[:2], torch.full((2,), coin, dtype=dtype))
    else:
        assert result.divergence_T[:2].min() > 900


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [2, 4, None])
def test_masked_tokens_count_nothing(k: int | None, beta: float) -> None:
    """Logits of -inf in both (a padded vocabulary) change nothing, even if they fill the tail."""
    student_TV, teacher_TV = _logits(8, vocabulary=4)
    padding = torch.full((len(student_TV), 3), float("-inf"), dtype=torch.float64)
    padded = [torch.cat([x, padding], -1) for x in (student_TV, teacher_TV)]
    torch.testing.assert_close(
        top_k_tail_divergence(*padded, k, beta).divergence_T,
        top_k_tail_divergence(student_TV, teacher_TV, k, beta).divergence_T,
    )
    torch.testing.assert_close(
        top_k_tail_divergence(*padded, k, beta).entropy_T, entropy(student_TV), rtol=1e-9, atol=0
    )
    gradient_TV = _gradient(*padded, k, beta)
    torch.testing.assert_close(gradient_TV[:, :4], _gradient(student_TV, teacher_TV, k, beta))
    assert (gradient_TV[:, 4:] == 0).all()


@pytest.mark.parametrize("k", [1, 2, None])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_tokens_impossible_for_one_of_the_two_have_a_finite_jsd(beta: float, k: int | None) -> None:
    """Logits of -inf in one distribution only: the JSD is the entropy of the mixing coin, the KLs infinite."""
    inf = float("inf")
    student_TV = torch.tensor([[0.0, 1.0, -inf, -inf]], dtype=torch.float64)
    teacher_TV = torch.tensor([[-inf, -inf, 2.0, 0.0]], dtype=torch.float64)
    coin = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    expected = _numpy_divergence(student_TV[0].numpy(), teacher_TV[0].numpy(), k, beta)
    assert top_k_tail_divergence(student_TV, teacher_TV, k, beta).divergence_T.item() == pytest.approx(
        expected
    )
    assert k == 1 or expected == pytest.approx(coin)
    leaf = student_TV.clone().requires_grad_()
    divergence(teacher_TV.log_softmax(-1), leaf.log_softmax(-1), beta).backward()
    assert leaf.grad.isfinite().all()
    assert _gradient(student_TV, teacher_TV, k, beta).isfinite().all()
    assert top_k_tail_divergence(student_TV, teacher_TV, None, 0.0).divergence_T.item() == inf
    assert top_k_tail_divergence(student_TV, teacher_TV, None, 1.0).divergence_T.item() == inf


def test_empty_tail_adds_no_value_and_no_gradient() -> None:
    student_TV, teacher_TV = _logits(9)
    leaf = student_TV.clone().requires_grad_()
    buckets_TB = bucketed_log_probs(leaf, student_top_k(leaf, V))
    assert (buckets_TB[:, -1] == float("-inf")).all()
    for beta in BETAS:
        full_T = divergence(teacher_TV.log_softmax(-1), student_TV.log_softmax(-1), beta)
        torch.testing.assert_close(top_k_tail_divergence(leaf, teacher_TV, V, beta).divergence_T, full_T)
        torch.testing.assert_close(
            _gradient(student_TV, teacher_TV, V, beta), _gradient(student_TV, teacher_TV, None, beta)
        )


def _check_tail(bucket_function: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    """A tail of mass 1e-12 must be there, in value and in gradient."""
    logits_TV = torch.tensor([[0.0, 0.0] + [math.log(1e-12 / 4) + math.log(2)] * 4], dtype=dtype)
    support_TK = torch.tensor([[0, 1]])
    leaf = logits_TV.clone().requires_grad_()
    tail_T = bucket_function(leaf, support_TK)[:, -1]
    assert tail_T.item() == pytest.approx(math.log(1e-12), rel=1e-6)
    (gradient_TV,) = torch.autograd.grad(tail_T.sum(), leaf)
    np.testing.assert_allclose(gradient_TV.numpy(), [[-0.5, -0.5, 0.25, 0.25, 0.25, 0.25]], rtol=1e-5)


def _clamped_tail(logits_TV: torch.Tensor, support_TK: torch.Tensor) -> torch.Tensor:
    """The usual shortcut: log(1 - sum of the support), clamped away from 0."""
    head_TK = logits_TV.log_softmax(-1).gather(-1, support_TK)
    mass_T1 = head_TK.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([head_TK, torch.log(-torch.expm1(mass_T1))], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_tail_is_exact(dtype: torch.dtype) -> None:
    _check_tail(bucketed_log_probs, dtype)
    with pytest.raises(AssertionError):
        _check_tail(_clamped_tail, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_tail_moves_the_closed_form(dtype: torch.dtype) -> None:
    """Student tail 1e-12, teacher tail 1e-3: forward KL pulls each tail token by t_v."""
    student_TV = torch.tensor([[0.0, 0.0] + [math.log(2e-12 / 4)] * 4], dtype=dtype)
    teacher_TV = torch.tensor([[0.0, 0.0] + [math.log(2e-3 / 4)] * 4], dtype=dtype)
    gradient_TV = _gradient(student_TV, teacher_TV, 2, 0.0)
    np.testing.assert_allclose(gradient_TV[0, 2:].numpy(), [-1e-3 / 1.001 / 4] * 4, rtol=1e-5)
    np.testing.assert_allclose(gradient_TV.sum().item(), 0.0, atol=1e-6)


def _check_small_jsd(rounding: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Teacher and student differ by 0.3% in the logits, about as far as one EMA step takes them."""
    generator = torch.Generator().manual_seed(11)
    student_TV = torch.randn(64, 500, generator=generator, dtype=torch.float64) * 4
    teacher_TV = student_TV + 3e-3 * torch.randn(64, 500, generator=generator, dtype=torch.float64)
    exact_T = top_k_tail_divergence(student_TV, teacher_TV, 100, 0.5).divergence_T
    rounded_T = top_k_tail_divergence(
        rounding(student_TV), rounding(teacher_TV), 100, 0.5
    ).divergence_T.double()
    assert ((rounded_T - exact_T).abs() / exact_T).median() < 0.01


def test_float32_logits_resolve_a_small_jsd_and_bfloat16_logits_do_not() -> None:
    _check_small_jsd(lambda x: x.float())
    with pytest.raises(AssertionError):
        _check_small_jsd(lambda x: x.bfloat16().float())


def test_half_precision_logits_are_refused() -> None:
    student_TV, teacher_TV = (x.bfloat16() for x in _logits(12))
    for call in (
        lambda: top_k_tail_divergence(student_TV, teacher_TV, 2, 0.5),
        lambda: pointwise_forward_kl(student_TV, teacher_TV, 0.05),
        lambda: bucketed_log_probs(student_TV, torch.zeros(5, 1, dtype=torch.long)),
        lambda: sampled_token_log_prob(student_TV, torch.zeros(5, dtype=torch.long)),
        lambda: entropy(student_TV),
    ):
        with pytest.raises(ValueError, match=r"bfloat16.*float32"):
            call()


def _check_near_agreement(kl: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """KL of two distributions over 152k tokens that differ by 3% in the logits: 1e-4 or so, in float32."""
    generator = torch.Generator().manual_seed(0)
    student_TV = torch.randn(8, 151_936, generator=generator) * 3
    teacher_TV = student_TV + 0.03 * torch.randn(8, 151_936, generator=generator)
    exact = [x.double().log_softmax(-1) for x in (teacher_TV, student_TV)]
    exact_T = (exact[0].exp() * (exact[0] - exact[1])).sum(-1)
    found_T = kl(teacher_TV, student_TV)
    assert (found_T >= 0).all()
    assert ((found_T.double() - exact_T).abs() / exact_T).max() < 3e-5


def test_kl_near_agreement_is_exact_and_the_sum_of_plain_terms_is_not() -> None:
    _check_near_agreement(lambda t, s: top_k_tail_divergence(s, t, None, 0.0).divergence_T)
    _check_near_agreement(lambda t, s: divergence(*(x - x.logsumexp(-1, keepdim=True) for x in (t, s)), 0.0))

    def plain(teacher_TV: torch.Tensor, student_TV: torch.Tensor) -> torch.Tensor:
        t, s = teacher_TV.log_softmax(-1), student_TV.log_softmax(-1)
        return (t.exp() * (t - s)).sum(-1)

    with pytest.raises(AssertionError):
        _check_near_agreement(plain)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31 - 1), st.floats(1e-6, 50.0), st.sampled_from((0.0, 1.0)), st.data())
def test_kl_is_never_negative(seed: int, distance: float, beta: float, data: st.DataObject) -> None:
    student_TV = _logits(seed, 4, 30)[0].float()
    teacher_TV = student_TV + distance * _logits(seed + 1, 4, 30, 1.0)[0].float()
    k = data.draw(st.sampled_from((1, 5, 30, None)))
    assert (top_k_tail_divergence(student_TV, teacher_TV, k, beta).divergence_T >= 0).all()


@pytest.mark.parametrize("k", [100, None])
def test_float32_by_products_are_those_of_float64(k: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    student_TV = torch.randn(4, 151_936, generator=generator) * 3
    teacher_TV = student_TV + torch.randn(4, 151_936, generator=generator)
    token_T = torch.tensor([0, 7, 151_935, 8])
    found = top_k_tail_divergence(student_TV, teacher_TV, k, 0.5)
    exact_TV = student_TV.double()
    for value_T, exact_T in (
        (found.entropy_T, entropy(exact_TV)),
        (entropy(student_TV), entropy(exact_TV)),
        (found.log_prob(student_TV, token_T), sampled_token_log_prob(exact_TV, token_T)),
    ):
        torch.testing.assert_close(value_T.double(), exact_T, rtol=3e-6, atol=0)


@pytest.mark.parametrize("k", [3, V, None])
def test_numbers_do_not_depend_on_how_many_rows_are_worked_on_at_once(
    k: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    student_TV, teacher_TV = _logits(15, tokens=9)
    token_T = torch.arange(9) % V

    def everything() -> list[torch.Tensor]:
        leaf = student_TV.clone().requires_grad_()
        found = top_k_tail_divergence(leaf, teacher_TV, k, 0.3)
        clipped_T, log_prob_T = (
            pointwise_forward_kl(leaf, teacher_TV, 0.1),
            sampled_token_log_prob(leaf, token_T),
        )
        (found.divergence_T + clipped_T + log_prob_T).sum().backward()
        return [*found, clipped_T, log_prob_T, entropy(student_TV), leaf.grad]

    at_once = everything()
    for entries in (1, 2 * V, 4 * V + 1):
        monkeypatch.setitem(divergence_module._ENTRIES, "cpu", entries)
        for whole, by_rows in zip(at_once, everything(), strict=True):
            assert torch.equal(whole, by_rows)


# --- the support -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(-2, 2), min_size=1, max_size=30), st.data())
def test_support_is_the_stable_sort_under_ties(values: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    logits_V = torch.tensor(values, dtype=torch.float32)
    expected = np.argsort(-logits_V.numpy(), kind="stable")[:k]
    support_TK = student_top_k(logits_V.expand(2, -1), k)
    assert support_TK.dtype == torch.int64
    for row in support_TK.tolist():
        assert sorted(row) == sorted(expected.tolist())


def test_support_larger_than_the_vocabulary_is_an_error_naming_both() -> None:
    logits_TV = torch.zeros(2, 5)
    for k in (6, 0):
        with pytest.raises(ValueError, match=rf"k={k}.*V=5"):
            student_top_k(logits_TV, k)


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
def test_beta_outside_its_range_is_an_error(beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        top_k_tail_divergence(torch.zeros(2, 5), torch.zeros(2, 5), 2, beta)


@pytest.mark.parametrize("k", [3, V, None])
def test_no_tokens_is_fine(k: int | None) -> None:
    leaf = torch.zeros(0, V, requires_grad=True)
    result = top_k_tail_divergence(leaf, torch.zeros(0, V), k, 0.5)
    result.divergence_T.sum().backward()
    assert result.divergence_T.shape == (0,)
    assert leaf.grad.shape == (0, V)


# --- the other per-token numbers ---------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 1.1])
@pytest.mark.parametrize("clip", [0.05, 0.5, float("inf")])
def test_pointwise_forward_kl(clip: float, temperature: float) -> None:
    student_TV, teacher_TV = _logits(13)
    s, t = (softmax(x.numpy() / temperature, -1) for x in (student_TV, teacher_TV))
    terms = t * np.log(t / s)
    assert (terms > 0.05).any()
    assert (terms < 0).any()
    leaf = student_TV.clone().requires_grad_()
    value_T = pointwise_forward_kl(leaf, teacher_TV, clip, temperature)
    np.testing.assert_allclose(value_T.detach().numpy(), np.minimum(terms, clip).sum(-1), rtol=1e-11)
    (gradient_TV,) = torch.autograd.grad(value_T.sum(), leaf)
    kept = terms < clip
    expected_TV = (s * (t * kept).sum(-1, keepdims=True) - t * kept) / temperature
    np.testing.assert_allclose(gradient_TV.numpy(), expected_TV, rtol=1e-10, atol=1e-13)
    if math.isinf(clip) and temperature == 1.0:
        torch.testing.assert_close(
            value_T, top_k_tail_divergence(student_TV, teacher_TV, None, 0.0).divergence_T
        )


def test_a_clipped_entry_pushes_down_the_token_that_the_teacher_prefers() -> None:
    """What README says of opsd_original: its gradient is p_S times the teacher's mass on the unclipped tokens."""
    teacher_TV = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
    student_TV = torch.tensor([[0.4, 0.5, 0.1]], dtype=torch.float64).log().requires_grad_()
    pointwise_forward_kl(student_TV, teacher_TV, 0.05).sum().backward()
    assert student_TV.grad[0, 0].item() == pytest.approx(0.4 * (0.3 + 0.1))
    student_TV.grad = None
    pointwise_forward_kl(student_TV, teacher_TV, math.inf).sum().backward()
    assert student_TV.grad[0, 0].item() == pytest.approx(0.4 - 0.6)


def test_sampled_token_log_prob_and_entropy() -> None:
    logits_TV = _logits(14)[0]
    token_T = torch.tensor([0, 6, 3, 3, 1])
    np.testing.assert_allclose(
        sampled_token_log_prob(logits_TV, token_T).numpy(),
        log_softmax(logits_TV.numpy(), -1)[np.arange(5), token_T.numpy()],
        rtol=1e-12,
    )
    p = softmax(logits_TV.numpy(), -1)
    np.testing.assert_allclose(entropy(logits_TV).numpy(), -(p * np.log(p)).sum(-1), rtol=1e-12)
    torch.autograd.gradcheck(lambda z: sampled_token_log_prob(z, token_T), logits_TV.clone().requires_grad_())
    torch.autograd.gradcheck(entropy, logits_TV.clone().requires_grad_())


def test_entropy_of_certain_uniform_and_masked_distributions() -> None:
    certain = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value_T = entropy(certain)
    value_T.sum().backward()
    assert value_T.item() == 0
    assert certain.grad.isfinite().all()
    masked = torch.tensor([[0.0, 0.0, float("-inf")]], requires_grad=True)
    entropy(masked).sum().backward()
    assert entropy(masked).item() == pytest.approx(math.log(2))
    assert masked.grad.isfinite().all()
    assert entropy(torch.zeros(1, 8)).item() == pytest.approx(logsumexp(np.zeros(8)))
