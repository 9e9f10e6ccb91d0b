"""The contract: what it refuses, how a method outside the repository is found, and its two aggregations."""

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from vopd import method as contract
from vopd.errors import UserError
from vopd.method import (
    Method,
    Rollout,
    Scorer,
    UpdateBatch,
    build,
    calling,
    check,
    place,
    sequence_mean,
    token_mean,
)
from vopd.method_checks import checked, checked_loss, checked_record, checked_rewards, checked_scores
from vopd.runner import new_recipe

OUTSIDE = """
from dataclasses import dataclass, field
from vopd.method import Method, Scorer, sequence_mean

@dataclass
class Settings:
    scale: float = 2.0

@dataclass(frozen=True)
class Outside(Method):
    settings: Settings = field(default_factory=Settings)

    def score(self, chunk):
        return {"value": chunk.student_logits_CV[:, 0] * self.settings.scale}

    def loss(self, per_token, mask_BT, batch):
        return sequence_mean(per_token["value"], mask_BT, batch)

    def record(self):
        return {}

def build(settings):
    return Outside(outputs=("value",), scorers={"t": Scorer("crop", "initial")}, settings=settings)
"""


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "outside.py").write_text(OUTSIDE)
    return tmp_path


def test_a_module_beside_a_recipe_outside_the_repository_loads(outside: Path) -> None:
    method = build({"module": "outside.py", "scale": 3}, outside)
    assert method.settings.scale == 3.0
    assert contract.default_settings("outside.py", outside) == {"scale": 2.0}


def test_its_path_may_be_absolute(outside: Path) -> None:
    assert build({"module": str(outside / "outside.py")}).settings.scale == 2.0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"module": "missing.py"}, "no such file"),
        ({"module": "vopd.nothing"}, "no such module"),
        ({"module": "vopd.errors"}, "has no `Settings`"),
        ({"module": "outside.py", "scael": 1}, "scael"),
        ({"module": "outside.py", "scale": "large"}, "scale"),
    ],
)
def test_build_refuses_with_a_sentence(outside: Path, settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build(settings, outside)


def check_unknown_key_refused(outside: Path) -> None:
    refused = ""
    try:
        build({"module": "outside.py", "rate_of_updtae": 0.5}, outside)
    except UserError as error:
        refused = str(error)
    assert "rate_of_updtae" in refused


def test_unknown_method_keys_are_errors(outside: Path) -> None:
    check_unknown_key_refused(outside)


def test_settings_twin_settings_that_take_every_key_are_seen(
    outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = OmegaConf.structured
    monkeypatch.setattr(
        OmegaConf, "structured", lambda cls: OmegaConf.create(OmegaConf.to_container(strict(cls)))
    )
    monkeypatch.setattr(OmegaConf, "to_object", lambda config: argparse.Namespace(**config))
    with pytest.raises(AssertionError):
        check_unknown_key_refused(outside)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rollout": Rollout("sideways")}, "view 'sideways'; choose one of full, crop"),
        ({"scorers": {"t": Scorer("corp", "initial")}}, "view 'corp'"),
        ({"scorers": {"t": Scorer("crop", "latest")}}, "weights 'latest'; choose one of current, initial"),
        ({"scorers": {"t": Scorer("crop", "ema", 0.0)}}, "rate of ema is 0.0"),
        ({"scorers": {"t": Scorer("crop", "trust_region", 1.5)}}, "rate of trust_region is 1.5"),
        ({"outputs": ()}, "declares no outputs"),
        ({"student_view": "ful"}, "view 'ful'"),
        ({"rollout": Rollout(weights="ema")}, "weights 'ema'; choose one of current, initial"),
        ({"rollout": Rollout("crop", "initial", True)}, "cannot be filtered"),
        ({"advantage": "gae"}, "advantage 'gae'; choose one of grpo"),
    ],
)
def test_check_refuses_what_is_outside_the_contract(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check(Method(**{"outputs": ("x",), **changes}))


@pytest.mark.parametrize("weights", contract.WEIGHTS)
def test_check_takes_all_weights_of_the_contract(weights: str) -> None:
    check(Method(outputs=("x",), scorers={"t": Scorer("noise", weights, 1.0)}))


def update(rows: int, tokens: int, ranks: int = 1) -> UpdateBatch:
    return UpdateBatch(rows=rows, tokens=tokens, ranks=ranks)


def test_sequence_mean_weighs_rows_and_token_mean_weighs_tokens() -> None:
    values_BT = torch.tensor([[1.0, 0.0, 9.0], [3.0, 3.0, 3.0]])
    mask_BT = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert sequence_mean(values_BT, mask_BT, update(2, 4)).item() == pytest.approx((1 + 3) / 2)
    assert token_mean(values_BT, mask_BT, update(2, 4)).item() == pytest.approx((1 + 9) / 4)


@pytest.mark.parametrize("aggregate", [sequence_mean, token_mean])
@given(lengths=st.lists(st.integers(1, 5), min_size=2, max_size=6), ranks=st.sampled_from([1, 2]))
def test_shares_of_any_split_add_up(aggregate, lengths: list[int], ranks: int) -> None:
    """FSDP averages over ranks: the mean over ranks of the summed shares is the loss of the whole."""
    torch.manual_seed(len(lengths))
    width, rows = max(lengths), len(lengths)
    values_BT = torch.rand(rows, width, dtype=torch.float64)
    mask_BT = (torch.arange(width) < torch.tensor(lengths)[:, None]).double()
    whole = aggregate(values_BT, mask_BT, update(rows, sum(lengths)))
    batch = update(rows, sum(lengths), ranks)
    shares = [aggregate(values_BT[i : i + 1], mask_BT[i : i + 1], batch) for i in range(rows)]
    torch.testing.assert_close(sum(shares) / ranks, whole)


def test_weights_multiply_rows_and_leave_the_divisor() -> None:
    values_BT, mask_BT = torch.tensor([[1.0, 3.0], [5.0, 9.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    batch = UpdateBatch(rows=2, tokens=3, ranks=1, weights_B=torch.tensor([1.5, 0.5]))
    assert sequence_mean(values_BT, mask_BT, batch).item() == pytest.approx((1.5 * 2 + 0.5 * 5) / 2)
    assert token_mean(values_BT, mask_BT, batch).item() == pytest.approx((1.5 * 4 + 0.5 * 5) / 3)


def test_a_row_without_tokens_counts_as_nothing() -> None:
    zero_BT = torch.zeros(1, 3)
    assert sequence_mean(zero_BT + 5, zero_BT, update(1, 0)).item() == 0
    assert token_mean(zero_BT + 5, zero_BT, update(1, 0)).item() == 0


def check_loss_reads_old_log_probs(method: Method) -> None:
    now_BT, mask_BT = torch.full((2, 3), -1.0), torch.ones(2, 3)

    def loss(old_BT: torch.Tensor) -> float:
        batch = UpdateBatch(rows=2, tokens=6, ranks=1, old_log_probs_BT=old_BT)
        return method.loss({"log_prob": now_BT}, mask_BT, batch).item()

    assert loss(now_BT) == pytest.approx(-1.0)
    assert loss(now_BT + 0.5) != pytest.approx(loss(now_BT), rel=1e-3)


@dataclass(frozen=True)
class Ratio(Method):
    """A method with an importance ratio; `own` puts in the defect old := current."""

    own: bool = False

    def loss(self, per_token, mask_BT, batch):  # type: ignore[no-untyped-def]
        old_BT = per_token["log_prob"].detach() if self.own else batch.old_log_probs_BT
        return sequence_mean(-(per_token["log_prob"] - old_BT).exp(), mask_BT, batch)


def test_the_contract_hands_over_old_log_probs() -> None:
    check_loss_reads_old_log_probs(Ratio(outputs=("log_prob",), needs_old_log_probs=True))


def test_old_log_probs_twin_old_set_to_current_is_seen() -> None:
    with pytest.raises(AssertionError):
        check_loss_reads_old_log_probs(Ratio(outputs=("log_prob",), needs_old_log_probs=True, own=True))


class Odd(Method):
    """A method whose functions a test replaces."""


def test_what_score_may_not_return() -> None:
    tokens_C, good_C = torch.zeros(3).long(), torch.zeros(3)
    assert checked_scores({"a": good_C, "entropy": good_C}, ("a",), tokens_C).keys() == {"a", "entropy"}
    for scored, said in [
        (good_C, "score returned a tensor of shape (3,); give a mapping"),
        (None, "score returned a NoneType"),
        ({}, "score did not return 'a'"),
        ({"a": good_C, "b": good_C}, "score returned 'b', which outputs doesn't declare"),
        (
            {"a": good_C.sum()},
            r"'a' as a tensor of shape (); it must be one number per token, a tensor of shape (3,)",
        ),
        ({"a": [0.0, 1.0, 2.0]}, "'a' as a list"),
        ({"a": tokens_C}, "'a' of type torch.int64; give floats"),
    ]:
        with pytest.raises(UserError, match=re.escape(said)):
            checked_scores(scored, ("a",), tokens_C)


def test_what_loss_may_not_return() -> None:
    student = torch.ones(2, requires_grad=True)
    checked_loss(student.sum())
    for loss, said in [
        (student, "loss returned a tensor of shape (2,); give a scalar"),
        (1.0, "loss returned a float"),
        (torch.tensor(1.0), "does not depend on the student"),
    ]:
        with pytest.raises(UserError, match=re.escape(said)):
            checked_loss(loss)
    with torch.no_grad():
        checked_loss(student.sum())


def test_what_rewards_and_prepare_may_not_return() -> None:
    assert checked_rewards(torch.tensor([1, 0]), 2).dtype == torch.float32
    for rewards_B, said in [
        ([1.0, 0.0], "rewards returned a list"),
        (torch.zeros(3), "rewards returned a tensor of shape (3,); give a tensor of shape (2,)"),
        (torch.tensor([1.0, float("nan")]), "not finite"),
    ]:
        with pytest.raises(UserError, match=re.escape(said)):
            checked_rewards(rewards_B, 2)
    with pytest.raises(UserError, match="prepare returned a NoneType"):
        checked(None, 2)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="prepare returned weights as a list"):
        checked({"weights": [1.0, 1.0]}, 2)  # type: ignore[dict-item]


@pytest.mark.parametrize("record", [None, {"a": torch.zeros(1)}, {"a": float("nan")}, ["a"]])
def test_a_record_that_a_summary_cannot_hold(record: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Odd, "record", lambda self: record)
    with pytest.raises(UserError, match="record returned"):
        checked_record(Odd(("a",)))


def test_a_method_without_a_record() -> None:
    with pytest.raises(UserError, match="The method has no record"):
        checked_record(Odd(("a",)))


def test_a_mistake_in_a_methods_function_names_its_place(tmp_path: Path) -> None:
    new_recipe.new("mine", tmp_path)
    method = build({"module": "mine.py"}, tmp_path)
    line = next(
        i for i, text in enumerate((tmp_path / "mine.py").read_text().splitlines(), 1) if "def score" in text
    )
    assert place(method, "score") == f"{tmp_path / 'mine.py'}, line {line}, in score"
    with (
        pytest.raises(UserError, match=re.escape(f"wrong [{place(method, 'score')}]")),
        calling(method, "score"),
    ):
        raise UserError("wrong")
    with pytest.raises(KeyError), calling(method, "score"):
        raise KeyError("theirs")


def test_a_module_is_what_its_file_says_now(tmp_path: Path) -> None:
    """Python's kept bytecode would answer for a file of the same size and time."""
    file = tmp_path / "mine.py"
    for value in ("1", "2"):
        file.write_text(f"rate = {value}\n")
        os.utime(file, (1e9, 1e9))
        assert contract.load_module("mine.py", tmp_path).rate == int(value)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]
