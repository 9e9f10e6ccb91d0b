"""Request seeds: other for every rollout, the same on every machine."""

from collections.abc import Callable

import pytest

from vopd.common.seeding import request_seed


def check_rollouts_differ(seed: Callable[[int, int, str, int], int]) -> None:
    seeds = {seed(r, s, i, n) for r in range(3) for s in range(3) for i in ("a", "b") for n in range(8)}
    assert len(seeds) == 3 * 3 * 2 * 8


def test_run_step_row_and_rollout_each_change_the_seed() -> None:
    check_rollouts_differ(request_seed)


def test_one_seed_for_all_rollouts_is_seen() -> None:
    with pytest.raises(AssertionError):
        check_rollouts_differ(lambda run, step, row, rollout: request_seed(run, step, row, 0))


def test_values_are_those_of_every_other_machine() -> None:
    assert [request_seed(0, 1, "row", n) for n in range(2)] == [553159730, 1926469533]
    assert request_seed(1, 0, "", 0) == 1128591556


def test_fits_a_signed_31_bit_seed() -> None:
    assert all(0 <= request_seed(0, 0, "x", n) < 2**31 for n in range(2000))
