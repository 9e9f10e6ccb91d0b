"""Recorded rollouts come back as they were, and a folder that does not fit a run is refused with a sentence."""

from pathlib import Path

import pytest

from vopd.backbone import recorded_rollouts
from vopd.backbone.recorded_rollouts import Group, check, read, write
from vopd.errors import UserError

GROUPS = [
    Group("a", [[5, 6, 2], [7, 2]], [[-0.5, -1.25, 0.0], [-2.0, -0.125]]),
    Group("a", [[1], [2]], [[-1.0], [-3.0]]),
    Group("b", [[9, 9, 9, 9], [2]], [[-1.0] * 4, [-0.25]]),
]


def test_a_step_comes_back_as_it_was(tmp_path: Path) -> None:
    write(tmp_path / "rollouts", 7, GROUPS, 2.5)
    assert [f.name for f in (tmp_path / "rollouts").iterdir()] == ["step000007.parquet"]
    assert read(tmp_path / "rollouts", 7) == (GROUPS, 2.5)


def test_check_accepts_what_fits(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path, step, GROUPS, 0.0)
    check(tmp_path, 2, prompts=3, rollouts=2)


@pytest.mark.parametrize(
    ("steps", "prompts", "rollouts", "sentence"),
    [(3, 3, 2, "step000003.parquet: no such recording"), (2, 4, 2, "wants 4 with 2"), (2, 3, 8, "3 with 8")],
)
def test_check_refuses_what_does_not(
    tmp_path: Path, steps: int, prompts: int, rollouts: int, sentence: str
) -> None:
    for step in (1, 2):
        write(tmp_path, step, GROUPS, 0.0)
    with pytest.raises(UserError, match=sentence):
        check(tmp_path, steps, prompts, rollouts)


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    recorded_rollouts.path(tmp_path, 1).write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="not a readable parquet file"):
        read(tmp_path, 1)


def test_a_response_without_its_log_probs_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1, [Group("a", [[1, 2]], [[-1.0]])], 0.0)
    with pytest.raises(UserError, match="2 tokens and 1 log-probs"):
        read(tmp_path, 1)
