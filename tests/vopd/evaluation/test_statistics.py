"""Statistics against hand-computed, scipy and statsmodels values."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import NormalIndPower

from vopd.errors import UserError
from vopd.evaluation import statistics as S


def answers(right: int, total: int, start: int = 0) -> dict[str, bool]:
    return {f"q{i:05d}": i - start < right for i in range(start, start + total)}


def from_list(values: list[int]) -> dict[str, bool]:
    return {f"q{i:05d}": bool(v) for i, v in enumerate(values)}


def test_wilson_interval_matches_the_formula() -> None:
    result = S.accuracy(answers(80, 100))
    z, n, p = stats.norm.ppf(0.975), 100, 0.8
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert result.value == pytest.approx(0.8)
    assert result.low == pytest.approx(centre - half, abs=1e-9)
    assert result.high == pytest.approx(centre + half, abs=1e-9)


def test_identical_copies_in_a_cluster_do_not_narrow_the_interval() -> None:
    rng = np.random.default_rng(3)
    single = from_list(list(rng.random(200) < 0.7))
    copied = {f"{i}-{c}": v for i, v in single.items() for c in range(4)}
    clusters = {i: i.split("-")[0] for i in copied}
    clustered = S.accuracy(copied, clusters)
    rows = S.accuracy(copied)
    independent = S.accuracy(single)
    assert clustered.value == pytest.approx(independent.value)
    width, expected = clustered.high - clustered.low, independent.high - independent.low
    assert width == pytest.approx(expected, rel=0.1)
    assert rows.high - rows.low < 0.6 * width


def test_cluster_bootstrap_agrees_with_scipy_and_the_normal_approximation() -> None:
    rng = np.random.default_rng(0)
    right, sizes = rng.integers(0, 4, 300), np.full(300, 4)
    sample = {f"{c}-{i}": bool(i < right[c]) for c in range(300) for i in range(4)}
    result = S.accuracy(sample, {i: i.split("-")[0] for i in sample})
    reference = stats.bootstrap(
        (right, sizes),
        lambda r, n, axis: r.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert result.low == pytest.approx(reference.low, abs=0.003)
    assert result.high == pytest.approx(reference.high, abs=0.003)
    assert result.high - result.low == pytest.approx(2 * 1.96 * right.std() / 4 / math.sqrt(300), rel=0.05)


def test_a_bootstrap_depends_on_its_seed_only() -> None:
    sample = from_list(list(np.random.default_rng(0).random(997) < 0.5))
    clusters = {i: int(i[1:]) // 3 for i in sample}
    results = [S.accuracy(sample, clusters, seed=seed) for seed in (4, 4, 5, 6)]
    assert results[0] == results[1]
    assert len(set(results)) > 1


@settings(max_examples=20, deadline=None)
@given(n_clusters=st.integers(2, 300), batch=st.integers(1, 5000), seed=st.integers(0, 9))
def test_samples_are_the_plain_draws_however_they_are_batched_or_kept(
    n_clusters: int, batch: int, seed: int
) -> None:
    """Sums of whole numbers by how often a cluster was drawn are those of the drawn clusters, to the bit."""
    sums_CK = np.random.default_rng(seed).integers(-3, 4, size=(n_clusters, 3)).astype(float)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S, "RESAMPLES", 99)
        cached = S._resampled(sums_CK, seed)
        patch.setattr(S, "_CACHED_CELLS", 0)
        patch.setattr(S, "_BATCH_CELLS", batch)
        streamed = S._resampled(sums_CK, seed)
    drawn_RC = np.random.default_rng(seed).integers(n_clusters, size=(99, n_clusters))
    assert (cached == sums_CK[drawn_RC].sum(axis=1)).all() and (streamed == cached).all()


def test_mcnemar_is_the_exact_binomial_test_on_discordant_pairs() -> None:
    first = from_list([1] * 50 + [1] * 4 + [0] * 15 + [0] * 31)
    second = from_list([1] * 50 + [0] * 4 + [1] * 15 + [0] * 31)
    result = S.paired_difference(first, second)
    assert result.value == pytest.approx(0.11)
    assert result.p_value == pytest.approx(stats.binomtest(4, 19, 0.5).pvalue)
    variance = (19 / 100 - 0.11**2) / 100
    assert result.high - result.low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.06)
    assert result.low < 0.11 < result.high


def test_pairing_narrows_the_interval_of_correlated_answers() -> None:
    rng = np.random.default_rng(1)
    base = rng.random(400) < 0.6
    flipped = np.where(rng.random(400) < 0.05, ~base, base)
    result = S.paired_difference(from_list(list(base)), from_list(list(flipped)))
    assert result.high - result.low < 0.5 * 2 * 1.96 * math.sqrt(2 * 0.24 / 400)


def test_paired_difference_is_antisymmetric_and_zero_on_equals() -> None:
    first, second = answers(40, 90), answers(55, 90)
    forward, back = S.paired_difference(first, second), S.paired_difference(second, first)
    assert forward.value == pytest.approx(-back.value)
    assert forward.p_value == pytest.approx(back.p_value)
    same = S.paired_difference(first, first)
    assert (same.value, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_clusters_weaken_a_repeated_difference() -> None:
    first = {f"{q}-{c}": False for q in range(30) for c in range(4)}
    second = {i: int(i.split("-")[0]) < 3 for i in first}
    clusters = {i: i.split("-")[0] for i in first}
    rows, grouped = S.paired_difference(first, second), S.paired_difference(first, second, clusters)
    assert rows.value == grouped.value == pytest.approx(0.1)
    assert grouped.p_value > 20 * rows.p_value
    assert grouped.high - grouped.low > 1.5 * (rows.high - rows.low)


def test_gap_is_crop_minus_full() -> None:
    assert S.gap(answers(60, 100), answers(90, 100)).value == pytest.approx(0.3)


def test_different_questions_are_an_error_that_names_some() -> None:
    with pytest.raises(UserError, match=r"'full' and 'crop'.*q00000") as caught:
        S.gap(answers(5, 10), answers(5, 10, start=2))
    assert "q00010" in str(caught.value)
    with pytest.raises(UserError, match="no answers"):
        S.accuracy({})
    with pytest.raises(UserError, match="no cluster"):
        S.accuracy(answers(1, 3), {"q00000": 1})
    with pytest.raises(UserError, match="at least two"):
        S.accuracy(answers(1, 2), {"q00000": 1, "q00001": 1})
    with pytest.raises(UserError, match="seed 1"):
        S.two_level({0: {"a": 1.0, "b": 0.0}, 1: {"a": 1.0}})


def test_gap_closed_by_hand() -> None:
    full, after, crop = answers(60, 100), answers(70, 100), answers(90, 100)
    result = S.gap_closed(full, after, crop)
    assert result is not None
    assert result.value == pytest.approx(1 / 3)
    assert result.low < 1 / 3 < result.high
    assert result.low > 0
    assert result.high < 0.6
    assert S.gap_closed(crop, after, full) is None


def test_gap_closed_has_no_limits_when_the_gap_may_be_nothing() -> None:
    full, crop = from_list([1, 0] * 20 + [0]), from_list([0, 1] * 20 + [1])
    result = S.gap_closed(full, full, crop)
    assert result is not None
    assert math.isnan(result.low)
    assert math.isnan(result.high)


def test_holm_by_hand() -> None:
    corrected = S.holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert corrected == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert S.holm({}) == {}


@pytest.mark.parametrize("n", [1, 2, 60])
def test_holm_is_that_of_statsmodels(n: int) -> None:
    p_values = np.random.default_rng(n).uniform(size=n).round(2) ** 4  # with ties, small and large
    corrected = S.holm({str(i): p for i, p in enumerate(p_values)})
    assert list(corrected.values()) == multipletests(p_values, method="holm")[1].tolist()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_lowers_a_p_value(p_values: list[float]) -> None:
    named = {str(i): p for i, p in enumerate(p_values)}
    assert all(named[k] - 1e-12 <= v <= 1 for k, v in S.holm(named).items())


def test_two_level_sees_the_spread_of_seeds() -> None:
    rng = np.random.default_rng(2)
    ids = [f"q{i}" for i in range(500)]
    equal = {s: {i: float(rng.random() < 0.7) for i in ids} for s in range(4)}
    spread = {s: {i: float(rng.random() < p) for i in ids} for s, p in enumerate((0.5, 0.6, 0.8, 0.9))}
    narrow, wide = S.two_level(equal), S.two_level(spread)
    assert wide.value == pytest.approx(0.7, abs=0.03)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)
    seeds_only = 2 * 1.96 * math.sqrt(np.var([0.5, 0.6, 0.8, 0.9]) / 4)
    assert wide.high - wide.low == pytest.approx(seeds_only, rel=0.25)


def test_two_level_with_one_seed_is_the_paired_bootstrap() -> None:
    first, second = answers(40, 200), answers(70, 200)
    one = S.two_level({0: S.answer_differences(first, second)})
    paired = S.paired_difference(first, second)
    assert one.value == pytest.approx(paired.value)
    assert one.low == pytest.approx(paired.low, abs=0.01)
    assert one.high == pytest.approx(paired.high, abs=0.01)
    assert one.p_value < 0.01


def test_two_level_resamples_clusters() -> None:
    values = {0: {f"{q}-{c}": float(q % 2) for q in range(40) for c in range(4)}}
    clusters = {i: i.split("-")[0] for i in values[0]}
    rows, grouped = S.two_level(values), S.two_level(values, clusters)
    assert grouped.high - grouped.low == pytest.approx(2 * (rows.high - rows.low), rel=0.15)


def test_two_level_ratio_by_hand_and_its_errors() -> None:
    rng = np.random.default_rng(5)
    ids = [f"q{i}" for i in range(300)]
    room = {s: dict.fromkeys(ids, 1.0) for s in range(3)}
    gained = {s: {i: float(rng.random() < p) for i in ids} for s, p in enumerate((0.2, 0.4, 0.6))}
    result = S.two_level_ratio(gained, room)
    mean = S.two_level(gained)
    assert result is not None
    assert (result.value, result.low, result.high) == pytest.approx((mean.value, mean.low, mean.high))
    with pytest.raises(UserError, match="seeds differ"):
        S.two_level_ratio(gained, {0: room[0]})
    with pytest.raises(UserError, match="same questions"):
        S.two_level_ratio({0: {"a": 1.0}}, {0: {"b": 1.0}})


def test_minimum_detectable_difference_matches_statsmodels() -> None:
    first, second = from_list([0, 1] * 100), from_list([1, 1, 0, 0, 0, 1, 0, 1] * 25)
    differences = np.array(list(S.answer_differences(first, second).values()))
    effect = NormalIndPower(ddof=0).solve_power(
        effect_size=None, nobs1=200, alpha=0.05, power=0.8, ratio=0, alternative="two-sided"
    )
    result = S.minimum_detectable_difference(first, second)
    assert result == pytest.approx(effect * differences.std(ddof=1), rel=1e-3)
    doubled = {f"{i}-{c}": v for i, v in first.items() for c in (0, 1)}
    doubled_second = {f"{i}-{c}": v for i, v in second.items() for c in (0, 1)}
    clusters = {i: i.split("-")[0] for i in doubled}
    assert S.minimum_detectable_difference(doubled, doubled_second, clusters) == pytest.approx(result)
    assert math.isnan(S.minimum_detectable_difference({"a": True}, {"a": False}))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30))
def test_limits_enclose_the_estimate(pairs: list[tuple[bool, bool]]) -> None:
    first = {str(i): a for i, (a, _) in enumerate(pairs)}
    second = {str(i): b for i, (_, b) in enumerate(pairs)}
    result = S.paired_difference(first, second)
    assert -1 <= result.low <= result.value + 1e-9
    assert result.value - 1e-9 <= result.high <= 1
    assert 0 <= result.p_value <= 1
    share = S.accuracy(first)
    assert share.low - 1e-9 <= share.value <= share.high + 1e-9
