"""Intervals and tests on correct/incorrect answers: accuracy, paired differences, the gap, several seeds.

Every function takes answers as a mapping from question id to correct or not and, where rows are copies or
neighbours of one another (HR-Bench's cyclic copies, MMVP's pairs, POPE's images), a mapping from id to cluster.
Comparisons are paired: both sides must have answered the same questions. Fractions, not points: 0.05 is five
points. Bootstraps are percentile bootstraps over clusters (single questions where there are none), seeded.
"""

# scipy and statsmodels are imported where they are used: they take a second, and every command imports this file.
from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from vopd.errors import UserError

Answers = Mapping[str, bool]  # question id -> correct
Clusters = Mapping[str, Hashable]  # question id -> cluster
SeedValues = Mapping[int, Mapping[str, float]]  # training seed -> question id -> value

RESAMPLES = 9999
_BATCH_CELLS = 2_000_000  # resampled cells drawn at once: bounds the memory of a bootstrap
_CACHED_CELLS = 16_000_000  # resamples up to this size (32 MB) are kept for the next set of as many clusters


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% limits, as fractions; NaN limits where the data determine none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """A paired difference, second minus first, with limits and a two-sided p-value."""

    p_value: float


def _questions(sides: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The common ids in order; UserError when the sides (by name) did not answer the same questions."""
    (first_name, first), *others = sides.items()
    if not first:
        raise UserError(f"'{first_name}' holds no answers; there is nothing to estimate.")
    for name, other in others:
        only_first, only_other = sorted(set(first) - set(other)), sorted(set(other) - set(first))
        if only_first or only_other:
            parts = [
                f"{len(ids)} only in '{where}' (such as {', '.join(ids[:3])})"
                for where, ids in ((first_name, only_first), (name, only_other))
                if ids
            ]
            raise UserError(
                f"'{first_name}' and '{name}' did not answer the same questions: {' and '.join(parts)}; "
                "compare runs on the same questions only."
            )
    return sorted(first)


def _cluster_sums(ids: Sequence[str], values_NK: np.ndarray, clusters: Clusters | None) -> np.ndarray:
    """Per cluster the sums of each column and, last, the cluster's size: (clusters, K + 1)."""
    values = np.column_stack([values_NK, np.ones(len(ids))])
    if clusters is None:
        return values
    missing = [i for i in ids if i not in clusters]
    if missing:
        raise UserError(f"{len(missing)} questions have no cluster (such as {', '.join(missing[:3])}).")
    index: dict[Hashable, int] = {}
    rows = [index.setdefault(clusters[i], len(index)) for i in ids]
    sums = np.zeros((len(index), values.shape[1]))
    np.add.at(sums, rows, values)
    return sums


def _resampled(sums_CK: np.ndarray, seed: int) -> np.ndarray:
    """Column sums of RESAMPLES bootstrap samples of the clusters: (RESAMPLES, K)."""
    if len(sums_CK) < 2:
        raise UserError("A bootstrap needs at least two independent questions (or clusters).")
    n = len(sums_CK)
    batches = (
        _cached_counts(n, seed, RESAMPLES) if n * RESAMPLES <= _CACHED_CELLS else _counts(n, seed, RESAMPLES)
    )
    return np.concatenate([counts_BC @ sums_CK for counts_BC in batches])


def _counts(n_clusters: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each bootstrap sample drew each cluster, batch by batch: (batch, clusters)."""
    rng = np.random.default_rng(seed)
    batch = max(1, _BATCH_CELLS // n_clusters)
    for start in range(0, resamples, batch):
        size = min(batch, resamples - start)
        cells_BC = rng.integers(n_clusters, size=(size, n_clusters)) + n_clusters * np.arange(size)[:, None]
        counts = np.bincount(cells_BC.ravel(), minlength=size * n_clusters).reshape(size, n_clusters)
        yield counts.astype(np.min_scalar_type(n_clusters))


@lru_cache(maxsize=4)
def _cached_counts(n_clusters: int, seed: int, resamples: int) -> Iterable[np.ndarray]:
    return tuple(_counts(n_clusters, seed, resamples))


def _limits(distribution: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(distribution, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _bootstrap_p(distribution: np.ndarray) -> float:
    """Two-sided p-value: how often the resampled difference falls on the other side of zero, doubled."""
    n = len(distribution)
    tail = min((distribution <= 0).sum(), (distribution >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (n + 1)))


def accuracy(
    answers: Answers, clusters: Clusters | None = None, *, seed: int = 0, level: float = 0.95
) -> Interval:
    """Share correct with its interval: Wilson (1927) for independent rows, cluster bootstrap given clusters.

    UserError when there are no answers or fewer than two clusters.
    """
    ids = _questions({"answers": answers})
    right = np.array([float(answers[i]) for i in ids])
    value = float(right.mean())
    if clusters is None:
        from statsmodels.stats.proportion import proportion_confint

        low, high = proportion_confint(int(right.sum()), len(ids), alpha=1 - level, method="wilson")
        return Interval(value, float(low), float(high))
    totals_RK = _resampled(_cluster_sums(ids, right[:, None], clusters), seed)
    return Interval(value, *_limits(totals_RK[:, 0] / totals_RK[:, 1], level))


def weighted_accuracy(
    answers: Answers,
    strata: Mapping[str, str],
    weights: Mapping[str, float],
    clusters: Clusters | None = None,
    *,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Weighted mean of the accuracies of strata (id -> stratum), such as CV-Bench's mean of 2D and 3D.

    Interval: bootstrap over clusters (questions where there are none); a resample without any question of a
    stratum is dropped. UserError when there are no answers or fewer than two clusters.
    """
    ids = _questions({"answers": answers})
    names = sorted(weights)
    member_NS = np.array([[float(strata[i] == name) for name in names] for i in ids])
    right_N = np.array([float(answers[i]) for i in ids])
    weight_S = np.array([weights[name] for name in names])
    value = float(weight_S @ (right_N @ member_NS / member_NS.sum(axis=0)))
    columns = np.column_stack([member_NS * right_N[:, None], member_NS])
    totals_RK = _resampled(_cluster_sums(ids, columns, clusters), seed)
    right_RS, size_RS = totals_RK[:, : len(names)], totals_RK[:, len(names) : -1]
    whole = (size_RS > 0).all(axis=1)
    return Interval(value, *_limits((right_RS[whole] / size_RS[whole]) @ weight_S, level))


def paired_difference(
    first: Answers,
    second: Answers,
    clusters: Clusters | None = None,
    *,
    names: tuple[str, str] = ("first", "second"),
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """accuracy(second) - accuracy(first) on the same questions.

    Interval: paired bootstrap over questions or clusters. p-value: exact McNemar test (1947) for independent
    rows, bootstrap given clusters. UserError naming some ids when the id sets differ.
    """
    ids = _questions({names[0]: first, names[1]: second})
    a, b = (np.array([float(side[i]) for i in ids]) for side in (first, second))
    totals_RK = _resampled(_cluster_sums(ids, (b - a)[:, None], clusters), seed)
    distribution = totals_RK[:, 0] / totals_RK[:, 1]
    if clusters is None:
        table = [[np.sum((a == x) & (b == y)) for y in (1, 0)] for x in (1, 0)]
        from statsmodels.stats.contingency_tables import mcnemar

        p_value = float(mcnemar(table, exact=True).pvalue)
    else:
        p_value = _bootstrap_p(distribution)
    return Difference(float((b - a).mean()), *_limits(distribution, level), p_value)


def gap(full: Answers, crop: Answers, clusters: Clusters | None = None, *, seed: int = 0) -> Difference:
    """The regional-to-global gap: accuracy on the crop minus accuracy on the full image, same questions."""
    return paired_difference(full, crop, clusters, names=("full", "crop"), seed=seed)


def gap_closed(
    full_before: Answers,
    full_after: Answers,
    crop_before: Answers,
    clusters: Clusters | None = None,
    *,
    seed: int = 0,
    level: float = 0.95,
) -> Interval | None:
    """(full_after - full_before) / (crop_before - full_before) with a paired bootstrap interval.

    None where there was no gap to close; limits as in `two_level_ratio`.
    """
    gained = answer_differences(full_before, full_after, ("full before", "full after"))
    room = answer_differences(full_before, crop_before, ("full before", "crop before"))
    return two_level_ratio({0: gained}, {0: room}, clusters, seed=seed, level=level)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values of one table corrected by Holm's step-down procedure (1979), under the same keys.

    As statsmodels' multipletests gives them, which collects all garbage of the process at each call (0.1 to 0.4 s).
    """
    given = np.array(list(p_values.values()))
    order = given.argsort()
    corrected = np.empty(len(given))
    steps = given[order] * np.arange(len(given), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return dict(zip(p_values, corrected.tolist(), strict=True))


def two_level(
    values: SeedValues,
    clusters: Clusters | None = None,
    *,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """Mean over training seeds and questions, both resampled (crossed: every seed answers every question).

    values: training seed -> question id -> correct or not (1, 0) or a paired difference (-1, 0, 1); the p-value
    (against zero) speaks only of differences. With few seeds the seeds' share of the interval is rough, and with
    one it is none at all. UserError when the seeds did not answer the same questions.
    """
    ids = _questions({f"seed {s}": answers for s, answers in values.items()})
    table_NS = np.array([[float(answers[i]) for answers in values.values()] for i in ids])
    sums = _cluster_sums(ids, table_NS, clusters)
    resampled_RK = _resample_seeds(_resampled(sums, seed), n_columns=1, seed=seed)
    distribution = resampled_RK[:, 0] / resampled_RK[:, 1]
    return Difference(float(table_NS.mean()), *_limits(distribution, level), _bootstrap_p(distribution))


def two_level_ratio(
    numerators: SeedValues,
    denominators: SeedValues,
    clusters: Clusters | None = None,
    *,
    seed: int = 0,
    level: float = 0.95,
) -> Interval | None:
    """Sum of the numerators over the sum of the denominators, both levels resampled as in `two_level`.

    None where the denominators' sum is not positive. The limits are NaN where that holds for more resamples
    than an interval leaves out at one end. UserError when seeds or questions differ.
    """
    if set(numerators) != set(denominators):
        raise UserError(f"The seeds differ: {sorted(numerators)} and {sorted(denominators)}.")
    sides = [numerators, denominators]
    ids = _questions({f"seed {s}, {n}": side[s] for n, side in enumerate(sides) for s in side})
    table_NK = np.array([[float(side[s][i]) for side in sides for s in numerators] for i in ids])
    top, bottom = table_NK[:, : len(numerators)].sum(), table_NK[:, len(numerators) :].sum()
    if bottom <= 0:
        return None
    totals_RK = _resampled(_cluster_sums(ids, table_NK, clusters), seed)
    resampled_RK = _resample_seeds(totals_RK, n_columns=2, seed=seed)
    positive = resampled_RK[:, 1] > 0
    if (~positive).mean() > (1 - level) / 2:
        return Interval(float(top / bottom), math.nan, math.nan)
    ratios = resampled_RK[positive, 0] / resampled_RK[positive, 1]
    return Interval(float(top / bottom), *_limits(ratios, level))


def _resample_seeds(totals_RK: np.ndarray, n_columns: int, seed: int) -> np.ndarray:
    """Means over resampled seeds of each of the n_columns blocks of seeds; the last column, the sizes, is kept."""
    n_seeds = (totals_RK.shape[1] - 1) // n_columns
    rng = np.random.default_rng([seed, 1])
    weights_RS = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), len(totals_RK)) / n_seeds
    blocks = [totals_RK[:, n * n_seeds : (n + 1) * n_seeds] for n in range(n_columns)]
    return np.column_stack([*((block * weights_RS).sum(axis=1) for block in blocks), totals_RK[:, -1]])


def answer_differences(
    first: Mapping[str, float], second: Mapping[str, float], names: tuple[str, str] = ("first", "second")
) -> dict[str, float]:
    """Per question second - first (correct counts 1); UserError naming some ids when the id sets differ."""
    return {i: float(second[i]) - float(first[i]) for i in _questions({names[0]: first, names[1]: second})}


def minimum_detectable_difference(
    first: Mapping[str, float],
    second: Mapping[str, float],
    clusters: Clusters | None = None,
    *,
    power: float = 0.8,
    level: float = 0.95,
) -> float:
    """Smallest true paired difference that questions like these would show with the given power.

    (z_{(1+level)/2} + z_power) times the cluster-robust standard error of the paired difference. NaN for fewer
    than two clusters.
    """
    differences = answer_differences(first, second)
    ids = list(differences)
    sums = _cluster_sums(ids, np.array(list(differences.values()))[:, None], clusters)
    if len(sums) < 2:
        return math.nan
    residuals = sums[:, 0] - sums[:, 1] * sums[:, 0].sum() / len(ids)
    error = math.sqrt(len(sums) / (len(sums) - 1) * float((residuals**2).sum())) / len(ids)
    from scipy import stats

    return float(error * (stats.norm.ppf((1 + level) / 2) + stats.norm.ppf(power)))
