"""The real FSDP2 engine on one rank, checked against plain transformers and against defects put in on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

from vopd.backbone.engine import warmup_factor
from vopd.backbone.head import ScoringHead, active
from vopd.backbone.model_inputs import response_positions
from vopd.backbone.projection import Projection
from vopd.backbone.scoring import Component, ScoringContext
from vopd.divergence import top_k_tail_divergence
from vopd.method import ScoreChunk

Results = Callable[..., dict[str, Any]]


# ---- no engine needed


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=5))
def test_positions_predict_each_response_token(rows: list[tuple[int, int]]) -> None:
    """What stands right behind a scored position of the packed sequence is the response token."""
    lengths, responses = [p + r for p, r in rows], [r for _, r in rows]
    packed = torch.cat([torch.arange(n) + 1000 * row for row, n in enumerate(lengths)])
    wanted = torch.cat([torch.arange(p, p + r) + 1000 * row for row, (p, r) in enumerate(rows)])
    positions_N = response_positions(lengths, responses)
    assert torch.equal(packed[positions_N + 1], wanted)
    assert not torch.equal(packed[positions_N], wanted)


def bfloat16_errors() -> tuple[float, float]:
    """Largest error of the head's JSD with half-precision operands, and the JSD itself (both float64)."""
    torch.manual_seed(0)
    hidden_NH = torch.randn(64, 32).bfloat16()
    teacher_NH = (hidden_NH + 0.02 * torch.randn(64, 32)).bfloat16()
    weight_VH = (0.4 * torch.randn(500, 32)).bfloat16()

    def score(chunk: ScoreChunk) -> dict[str, torch.Tensor]:
        student_CV, teacher_CV = chunk.student_logits_CV, chunk.scorer_logits["teacher"]
        return {"divergence": top_k_tail_divergence(student_CV, teacher_CV, 20, 0.5).divergence_T}

    head = ScoringHead(nn.Parameter(weight_VH))
    context = ScoringContext(
        score,
        ("divergence",),
        torch.zeros(64, dtype=torch.long),
        chunk=16,
        scorers={"teacher": (Component(teacher_NH, weight_VH),)},
    )
    with active(head, context), torch.autocast("cpu", dtype=torch.bfloat16):
        ours_N = head(hidden_NH[None])[0, :, 0].double()
    exact = [(h.double() @ weight_VH.double().t()) for h in (hidden_NH, teacher_NH)]
    exact_N, *_ = top_k_tail_divergence(*exact, 20, 0.5)
    return (ours_N - exact_N).abs().mean().item(), exact_N.mean().item()


def check_projection_noise_below_signal() -> None:
    error, signal = bfloat16_errors()
    assert error < 0.01 * signal


def test_half_precision_operands_are_projected_in_float32() -> None:
    check_projection_noise_below_signal()


def test_logits_twin_logits_rounded_to_bfloat16_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Projection.write_logits

    def rounded(self: Projection, rows: slice, logits_CV: torch.Tensor) -> None:
        exact(self, rows, logits_CV)
        logits_CV.copy_(logits_CV.bfloat16())

    monkeypatch.setattr(Projection, "write_logits", rounded)
    with pytest.raises(AssertionError):
        check_projection_noise_below_signal()


def check_first_rate(factor: Callable[[int, int], float]) -> None:
    for warmup in (0, 1, 5, 100):
        factors = [factor(step, warmup) for step in range(warmup + 3)]
        assert factors[0] > 0
        assert factors == sorted(factors) and factors[-1] == 1.0


def test_warm_up_never_starts_at_zero() -> None:
    check_first_rate(warmup_factor)


def test_warm_up_twin_a_schedule_that_starts_at_zero_is_seen() -> None:
    with pytest.raises(AssertionError):
        check_first_rate(lambda step, warmup: min(1.0, step / max(warmup, 1)))


# ---- the engine against plain transformers


def reference(model: nn.Module, engine_case: ModuleType, column: str) -> dict[int, torch.Tensor]:
    """Log-probs of each response behind the picture in `column`, by transformers alone, float32."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(engine_case.BASE)
    log_probs = {}
    rows = zip(engine_case.make_rows(), engine_case.make_responses(), strict=True)
    for i, (row, response_R) in enumerate(rows):
        content = [{"type": "image", "image": row[column]}, {"type": "text", "text": row["question"]}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(text=[text], images=[row[column]], return_tensors="pt")
        for key, fill in (("input_ids", response_R), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            tail = fill if torch.is_tensor(fill) else torch.full_like(response_R, fill)
            inputs[key] = torch.cat([inputs[key], tail[None].to(inputs[key])], dim=1)
        with torch.no_grad():
            logits_LV = model(**inputs, use_cache=False).logits[0]
        scored_RV = logits_LV[-len(response_R) - 1 : -1].log_softmax(-1)
        log_probs[i] = scored_RV.gather(-1, response_R[:, None])[:, 0]
    return log_probs


@pytest.fixture(scope="module")
def plain_model(engine_folder: Path) -> nn.Module:
    from transformers import AutoModelForImageTextToText

    torch.set_num_threads(1)
    return AutoModelForImageTextToText.from_pretrained(engine_folder / "tied", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def alone(plain_model: nn.Module, engine_case: ModuleType) -> dict[str, dict[int, torch.Tensor]]:
    return {
        "log_prob": reference(plain_model, engine_case, "image"),
        "teacher_log_prob": reference(plain_model, engine_case, "crop"),
    }


def check_scored_as_alone(rows: dict[int, Any], alone: dict[str, Any], name: str) -> None:
    for i, wanted_R in alone[name].items():
        torch.testing.assert_close(rows[i][name], wanted_R, rtol=0, atol=1e-4)


@pytest.mark.distributed
def test_student_scores_as_in_plain_transformers(one_rank: Results, alone: dict[str, Any]) -> None:
    check_scored_as_alone(one_rank("positions")["own"], alone, "log_prob")


@pytest.mark.distributed
def test_reading_one_position_later_is_seen(one_rank: Results, alone: dict[str, Any]) -> None:
    for name in alone:
        with pytest.raises(AssertionError):
            check_scored_as_alone(one_rank("positions")["shifted_defect"], alone, name)


@pytest.mark.distributed
def test_teacher_view_scores_as_alone(one_rank: Results, alone: dict[str, Any]) -> None:
    check_scored_as_alone(one_rank("positions")["own"], alone, "teacher_log_prob")


@pytest.mark.distributed
def test_positions_twin_positions_of_the_students_prompt_are_seen(
    one_rank: Results, alone: dict[str, Any]
) -> None:
    inherited = one_rank("positions")["inherited_defect"]
    check_scored_as_alone(inherited, alone, "log_prob")
    with pytest.raises(AssertionError):
        check_scored_as_alone(inherited, alone, "teacher_log_prob")


@pytest.mark.distributed
def test_second_update_of_a_batch_is_scored_by_the_moved_teacher(
    one_rank: Results, plain_model: nn.Module, engine_case: ModuleType, engine_folder: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    played = one_rank("several_updates")
    for step in (0, 1):
        old, new, student = played["teacher"][step], played["teacher"][step + 1], played["student"][step + 1]
        for name in new:
            torch.testing.assert_close(new[name], old[name] + 0.3 * (student[name] - old[name]))
    assert any(not torch.equal(played["teacher"][1][k], v) for k, v in played["teacher"][0].items())
    moved = AutoModelForImageTextToText.from_pretrained(engine_folder / "tied", dtype=torch.float32).eval()
    moved.load_state_dict(played["teacher"][1])
    by_the_first = {"teacher_log_prob": reference(plain_model, engine_case, "crop")}
    by_the_moved = {"teacher_log_prob": reference(moved, engine_case, "crop")}
    check_scored_as_alone(played["rows"][0], by_the_first, "teacher_log_prob")
    check_scored_as_alone(played["rows"][1], by_the_moved, "teacher_log_prob")
    with pytest.raises(AssertionError):
        check_scored_as_alone(played["rows"][1], by_the_first, "teacher_log_prob")


# ---- the engine against itself -------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("model", ["tied", "untied"])
def test_teacher_at_rate_one_is_the_student_in_every_tensor(
    one_rank: Results, check_teacher_is_student: Any, model: str
) -> None:
    check_teacher_is_student(one_rank("ema_one")[model])


@pytest.mark.distributed
@pytest.mark.parametrize("model", ["tied", "untied"])
def test_teacher_twin_a_forgotten_root_unit_is_seen(
    one_rank: Results, check_teacher_is_student: Any, model: str
) -> None:
    with pytest.raises(AssertionError):
        check_teacher_is_student(one_rank("ema_one")[f"{model}_defect"])


@pytest.mark.distributed
def test_teachers_are_kept_in_float32(one_rank: Results) -> None:
    for model in ("tied", "untied"):
        assert one_rank("ema_one")[model]["dtypes"] == ["torch.float32"]


@pytest.mark.distributed
def test_resume_continues_the_engine_bit_by_bit(one_rank: Results, check_resumed: Any) -> None:
    check_resumed(one_rank("checkpoint"), "resumed")


@pytest.mark.distributed
def test_resume_twin_a_teacher_that_starts_again_is_seen(one_rank: Results, check_resumed: Any) -> None:
    with pytest.raises(AssertionError):
        check_resumed(one_rank("checkpoint"), "resumed_defect")


def check_ratio_reads_old_log_probs(losses: dict[str, Any], suffix: str) -> None:
    as_it_was, perturbed = losses[f"0.0{suffix}"]["loss"], losses[f"0.3{suffix}"]["loss"]
    # ratio = p / p_old: raising every old log-prob by 0.3 divides the loss by e^0.3
    assert perturbed == pytest.approx(as_it_was / 1.3498588, rel=1e-4)


@pytest.mark.distributed
def test_perturbed_old_log_probs_change_the_loss(one_rank: Results) -> None:
    check_ratio_reads_old_log_probs(one_rank("old_log_probs"), "")


@pytest.mark.distributed
def test_old_log_probs_twin_old_set_to_current_is_seen(one_rank: Results) -> None:
    with pytest.raises(AssertionError):
        check_ratio_reads_old_log_probs(one_rank("old_log_probs"), "_defect")


@pytest.mark.distributed
def test_a_method_that_returns_the_log_prob_itself_gets_its_gradient(one_rank: Results) -> None:
    assert one_rank("old_log_probs")["0.0"]["grad_norm"] > 1e-3


@pytest.mark.distributed
def test_loss_and_gradient_do_not_depend_on_the_split(one_rank: Results, check_same_update: Any) -> None:
    played = one_rank("micro_batches")
    check_same_update(played, played["packed/4096"], "")


@pytest.mark.distributed
def test_split_twin_a_mean_per_micro_batch_is_seen(one_rank: Results, check_same_update: Any) -> None:
    played = one_rank("micro_batches")
    with pytest.raises(AssertionError):
        check_same_update(played, played["packed/4096_defect"], "_defect")


@pytest.mark.distributed
def test_packed_sequences_score_as_padded_ones(one_rank: Results, check_packing: Any) -> None:
    check_packing(one_rank("packing"), "packed")


@pytest.mark.distributed
def test_rollouts_of_a_prompt_share_a_micro_batch_and_the_encoding_of_their_images(one_rank: Results) -> None:
    """Two prompts, seen by student and teacher: 4 encodings. Cut anywhere, each of the student's rows needs its own;
    the teacher's, which are shorter, fit into one micro-batch."""
    played = one_rank("together")
    assert played["with"]["encoded"] == [4.0]
    assert played["without"]["encoded"] == [6.0]
    assert played["with"]["loss"] == pytest.approx(played["without"]["loss"], rel=1e-5)


@pytest.mark.distributed
def test_packing_twin_a_leaking_state_is_seen(one_rank: Results, check_packing: Any) -> None:
    with pytest.raises(AssertionError):
        check_packing(one_rank("packing"), "packed_defect")


def check_nothing_to_learn(played: dict[str, float]) -> None:
    assert abs(played["loss"]) < 1e-9
    assert played["grad_norm"] < 1e-6


@pytest.mark.distributed
@pytest.mark.parametrize("context", ["same_view", "same_picture"])
def test_identical_contexts_give_no_loss(one_rank: Results, context: str) -> None:
    check_nothing_to_learn(one_rank("same_context")[context])


@pytest.mark.distributed
def test_context_twin_a_teacher_prompt_without_template_is_seen(one_rank: Results) -> None:
    with pytest.raises(AssertionError):
        check_nothing_to_learn(one_rank("same_context")["no_template_defect"])


def check_first_update_trains(played: dict[str, Any]) -> None:
    assert played["rates"] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01, 0.01, 0.01])
    assert played["moved"] > 1e-4


@pytest.mark.distributed
def test_first_update_moves_the_weights(one_rank: Results) -> None:
    check_first_update_trains(one_rank("first_learning_rate")["ours"])


@pytest.mark.distributed
def test_warm_up_twin_verls_own_schedule_is_seen(one_rank: Results) -> None:
    with pytest.raises(AssertionError):
        check_first_update_trains(one_rank("first_learning_rate")["verl_defect"])


@pytest.mark.distributed
def test_teacher_and_student_change_places_exactly(one_rank: Results) -> None:
    assert all(one_rank("exchange").values()), one_rank("exchange")


@pytest.mark.distributed
def test_a_non_finite_gradient_is_skipped_and_counted(one_rank: Results, check_skipped: Any) -> None:
    check_skipped(one_rank("non_finite"))


# ---- what a method may ask of a whole step -------------------------------------------------------------------------


@pytest.mark.distributed
def test_old_log_probs_are_those_of_the_policy_before_the_update(one_rank: Results) -> None:
    played = one_rank("old_before_update")
    assert played["apart"] < 1e-5
    assert played["apart_after_update"] > 1e-3


@pytest.mark.distributed
def test_with_one_update_a_batch_the_old_log_probs_are_the_updates_own(one_rank: Results) -> None:
    played = one_rank("one_update_a_batch")
    assert played["own"]["loss"] == pytest.approx(played["pass"]["loss"], rel=1e-6)
    for name, grad in played["pass"]["grads"].items():
        assert (played["own"]["grads"][name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize(("updates", "passes"), [(1, 0), (2, 1)])
def test_the_pass_for_old_log_probs_is_made_where_a_batch_has_several_updates(
    updates: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vopd.backbone.worker import MethodWorker, stored_views, verl_internals

    monkeypatch.setattr(stored_views, "of_rows", lambda uids: [{"full": {}} for _ in uids])
    worker = MethodWorker.__new__(MethodWorker)
    worker.actor = mock.Mock()
    worker.actor.engine.method.needs_old_log_probs = True
    worker.config = OmegaConf.create({"vopd": {"train": {"updates_per_batch": updates}}})
    data: dict[str, Any] = {"uid": ["1", "1"]}
    monkeypatch.setattr(verl_internals.ActorRolloutRefWorker, "update_actor", lambda _self, given: given)
    assert ("old_log_probs" in worker.update_actor(data)) == (passes > 0)
    assert worker.actor.log_probs.call_count == passes


@pytest.mark.distributed
def test_the_rollouts_log_probs_reach_the_loss_token_by_token(one_rank: Results) -> None:
    """Weights 1, 1.5 and, where the ratio is 4, the limit 2."""
    played = one_rank("rollout_log_probs")
    tokens = torch.cat([row["divergence"] for row in played["1.0"]["rows"].values()])
    for ratio, weight in (("1.0", 1.0), ("1.5", 1.5), ("4.0", 2.0)):
        for split in ("", "_split"):
            loss = played[f"{ratio}{split}"]["loss"]
            assert loss == pytest.approx(weight * tokens.mean().item(), rel=1e-4), (ratio, split)


@pytest.mark.distributed
def test_a_loss_that_needs_the_rollouts_log_probs_says_that_there_are_none(one_rank: Results) -> None:
    sentence = one_rank("rollout_log_probs")["without"]
    assert "these rollouts have no log-probs" in sentence and "vision_opd.py, line" in sentence


def check_same(played: dict[str, Any], first: str, second: str) -> None:
    assert played[first]["loss"] == pytest.approx(played[second]["loss"], rel=1e-5)
    for name, grad in played[second]["grads"].items():
        assert (played[first]["grads"][name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.distributed
def test_rows_not_kept_are_as_if_they_were_not_there(one_rank: Results) -> None:
    played = one_rank("prepared")
    check_same(played, "two", "two_alone")
    check_same(played, "two_split", "two_alone")
    with pytest.raises(AssertionError):
        check_same(played, "two", "all")


@pytest.mark.distributed
def test_weights_multiply_the_terms_of_their_rows(one_rank: Results) -> None:
    """Weights 2, 0, 2, 0 of four rows: the mean over rows 0 and 2."""
    check_same(one_rank("prepared"), "weighted", "two_alone")


@pytest.mark.distributed
def test_an_update_without_a_kept_row_moves_nothing(one_rank: Results) -> None:
    assert one_rank("prepared")["none"] == {
        "empty": [1.0],
        "skipped": [0.0],
        "student_moved": False,
        "teacher_moved": False,
    }


@pytest.mark.distributed
@pytest.mark.parametrize("recipe", ["grpo", "dapo"])
def test_three_updates_equal_those_of_stock_verl(one_rank: Results, recipe: str) -> None:
    """Our recipe against verl's own head, advantages and actor loss on the same rows: loss and gradient norm."""
    played = one_rank("stock")[recipe]
    assert len(played["ours"]) == 3
    assert len({round(loss, 6) for loss, _ in played["ours"]}) == 3, "nothing was learnt between the updates"
    for (loss, norm), (stock_loss, stock_norm) in zip(played["ours"], played["stock"], strict=True):
        assert loss == pytest.approx(stock_loss, rel=1e-6)
        assert norm == pytest.approx(stock_norm, rel=1e-6)
        assert norm > 0, "clipped away: an update without a gradient proves nothing"
