"""The real FSDP2 engine on two gloo ranks: the same numbers as on one, and ranks that act together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.distributed
Results = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_teacher_at_rate_one_is_the_student_in_every_tensor(
    two_ranks: Results, check_teacher_is_student: Any, model: str
) -> None:
    check_teacher_is_student(two_ranks("ema_one")[model])


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_teacher_twin_a_forgotten_root_unit_is_seen(
    two_ranks: Results, check_teacher_is_student: Any, model: str
) -> None:
    with pytest.raises(AssertionError):
        check_teacher_is_student(two_ranks("ema_one")[f"{model}_defect"])


def test_resume_continues_the_ranks_bit_by_bit(two_ranks: Results, check_resumed: Any) -> None:
    check_resumed(two_ranks("checkpoint"), "resumed")
    check_resumed(two_ranks("checkpoint"), "resumed_from_one_rank")


def test_resume_twin_a_teacher_that_starts_again_is_seen(two_ranks: Results, check_resumed: Any) -> None:
    with pytest.raises(AssertionError):
        check_resumed(two_ranks("checkpoint"), "resumed_defect")


def test_two_ranks_make_the_update_of_one(
    one_rank: Results, two_ranks: Results, check_same_update: Any
) -> None:
    check_same_update(two_ranks("micro_batches"), one_rank("micro_batches")["packed/4096"], "")


def test_split_twin_a_mean_per_micro_batch_is_seen(
    one_rank: Results, two_ranks: Results, check_same_update: Any
) -> None:
    with pytest.raises(AssertionError):
        check_same_update(
            two_ranks("micro_batches"), one_rank("micro_batches")["packed/4096_defect"], "_defect"
        )


def test_gradients_reduced_once_are_those_reduced_each_time(two_ranks: Results) -> None:
    each, once = (two_ranks("reduce_once")[str(way)] for way in (False, True))
    assert 0 < 2 * once["reductions"] <= each["reductions"]
    assert once["loss"] == pytest.approx(each["loss"], rel=1e-6)
    assert once["grads"].keys() == each["grads"].keys()
    for name, grad in each["grads"].items():
        assert (once["grads"][name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize("rank", [0, 1])
def test_packed_sequences_score_as_padded_ones(two_ranks: Results, check_packing: Any, rank: int) -> None:
    check_packing(two_ranks("packing", rank), "packed")


@pytest.mark.parametrize("rank", [0, 1])
def test_packing_twin_a_leaking_state_is_seen(two_ranks: Results, check_packing: Any, rank: int) -> None:
    with pytest.raises(AssertionError):
        check_packing(two_ranks("packing", rank), "packed_defect")


def test_every_row_scores_as_on_one_rank(one_rank: Results, two_ranks: Results) -> None:
    alone = one_rank("packing")["padded"]
    together = two_ranks("packing", 0)["padded"] | two_ranks("packing", 1)["padded"]
    assert sorted(together) == sorted(alone)
    for i, numbers in alone.items():
        for name, values_R in numbers.items():
            torch.testing.assert_close(together[i][name], values_R, rtol=0, atol=1e-5)


def test_a_nan_on_one_rank_is_skipped_by_both(two_ranks: Results, check_skipped: Any) -> None:
    played = two_ranks("non_finite")
    assert len(played["ranks"]) == 2
    check_skipped(played)
