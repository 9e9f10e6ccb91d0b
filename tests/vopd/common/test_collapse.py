"""Collapse flags: off in a healthy run, on for each of the three ways to collapse."""

import math

import pytest

from vopd.common.collapse import FLAGS, collapse_flags

HEALTHY = {"truncated": 0.02, "entropy": 0.44, "divergence": 0.03}


@pytest.mark.parametrize(
    ("change", "flags"),
    [
        ({}, set()),
        ({"truncated": 0.5}, {"length"}),
        ({"entropy": 0.009}, {"entropy"}),
        ({"divergence": 0.29}, set()),
        ({"divergence": 0.31}, {"divergence"}),
        ({"divergence": math.nan}, {"divergence"}),
        ({"entropy": math.nan}, {"entropy"}),
        ({"loss": math.inf}, {"loss"}),
        ({"divergence": math.inf, "truncated": 1.0, "entropy": 0.0, "loss": math.nan}, set(FLAGS)),
    ],
)
def test_flags(change: dict[str, float], flags: set[str]) -> None:
    found = collapse_flags(HEALTHY | change, HEALTHY)
    assert tuple(found) == FLAGS
    assert {name for name, on in found.items() if on} == flags


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_first_step_that_is_not_finite_is_flagged_itself_and_hides_no_later_one(value: float) -> None:
    first = HEALTHY | {"divergence": value}
    assert collapse_flags(first, first)["divergence"]
    assert collapse_flags(HEALTHY | {"divergence": math.inf}, first)["divergence"]
    assert not collapse_flags(HEALTHY, first)["divergence"]


def test_a_method_without_a_divergence_has_none_to_explode() -> None:
    line = {"truncated": 0.0, "entropy": 0.4}
    assert not any(collapse_flags(line, line).values())


def test_a_policy_that_was_certain_from_the_start_is_not_flagged() -> None:
    line = {"truncated": 0.0, "entropy": 0.001}
    assert not collapse_flags(line, line)["entropy"]


def test_a_divergence_that_starts_at_rounding_level_may_grow_to_a_small_one() -> None:
    start = HEALTHY | {"divergence": 1e-12}
    assert not collapse_flags(HEALTHY | {"divergence": 0.009}, start)["divergence"]
    assert collapse_flags(HEALTHY | {"divergence": 0.02}, start)["divergence"]
