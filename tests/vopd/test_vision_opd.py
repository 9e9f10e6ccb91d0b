"""Vision-OPD in the contract: the paper's defaults, its loss as the formula says it, and what it refuses."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from vopd.config import load
from vopd.errors import UserError
from vopd.method import Method, ScoreChunk, UpdateBatch, build, default_settings, sequence_mean
from vopd.vision_opd import VisionOPD

MODULE = {"module": "vopd.vision_opd"}


def jsd(p_V: torch.Tensor, q_V: torch.Tensor) -> torch.Tensor:
    m_V = (p_V + q_V) / 2
    return ((p_V * (p_V / m_V).log()).sum() + (q_V * (q_V / m_V).log()).sum()) / 2


def chunk(rows: int = 4, vocabulary: int = 12) -> ScoreChunk:
    torch.manual_seed(0)
    student_CV = torch.randn(rows, vocabulary, dtype=torch.float64, requires_grad=True)
    teacher_CV = torch.randn(rows, vocabulary, dtype=torch.float64)
    return ScoreChunk(student_CV, {"teacher": teacher_CV}, torch.zeros(rows, dtype=torch.long), {})


def test_defaults_are_the_papers() -> None:
    assert default_settings("vopd.vision_opd") == {
        "top_k": 100,
        "beta": 0.5,
        "teacher": "ema",
        "teacher_rate": 0.05,
        "teacher_view": "crop",
        "aggregation": "sequence_mean",
        "importance_limit": None,
    }
    method = build(MODULE)
    assert (method.rollout.view, method.advantage, method.needs_old_log_probs) == ("full", None, False)
    teacher = method.scorers["teacher"]
    assert (teacher.view, teacher.weights, teacher.rate) == ("crop", "ema", 0.05)


def test_divergence_is_the_jsd_over_the_students_top_k_and_one_tail() -> None:
    given = chunk()
    scored = build({**MODULE, "top_k": 3}).score(given)
    for c in range(4):
        p_V, q_V = given.student_logits_CV[c].softmax(-1), given.scorer_logits["teacher"][c].softmax(-1)
        top = p_V.topk(3).indices
        buckets = [torch.cat([x_V[top], 1 - x_V[top].sum()[None]]) for x_V in (p_V, q_V)]
        torch.testing.assert_close(scored["divergence"][c], jsd(*buckets))
        torch.testing.assert_close(scored["student_mass"][c], p_V[top].sum())
        torch.testing.assert_close(scored["teacher_mass"][c], q_V[top].sum())
        torch.testing.assert_close(scored["entropy"][c], -(p_V * p_V.log()).sum())


def test_it_scores_what_it_declares_and_the_student_alone_gets_gradient() -> None:
    method = build({**MODULE, "top_k": 3})
    given = chunk()
    given.scorer_logits["teacher"].requires_grad_()
    scored = method.score(given)
    assert set(scored) == {*method.outputs, "log_prob"}
    assert not scored["log_prob"].requires_grad
    logits = (given.student_logits_CV, given.scorer_logits["teacher"])
    to_student, to_teacher = torch.autograd.grad(scored["divergence"].sum(), logits, allow_unused=True)
    assert to_student.abs().max() > 0
    assert to_teacher is None


def test_loss_is_the_mean_over_each_response_then_over_responses() -> None:
    divergence_BT = torch.tensor([[2.0, 4.0, 7.0], [1.0, 7.0, 7.0]])
    mask_BT = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    loss = VisionOPD(outputs=("divergence",)).loss(
        {"divergence": divergence_BT}, mask_BT, UpdateBatch(rows=2, tokens=3, ranks=1)
    )
    assert loss.item() == (3.0 + 1.0) / 2


def script(**settings: Any) -> Method:
    """The recipe `vision_opd_authors_script`, with other settings if given."""
    return build({**load("ablations/vision_opd_authors_script", []).method, **settings})


def responses() -> tuple[torch.Tensor, torch.Tensor, UpdateBatch]:
    """Divergences of three responses of 4, 1 and 2 tokens, their mask, and what the policies said of the tokens."""
    generator = torch.Generator().manual_seed(5)
    divergence_BT = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    mask_BT = (torch.arange(4) < torch.tensor([4, 1, 2])[:, None]).double()
    # Ratios from 0.3 to 3.5 to the rollout's policy, and one beyond what an exponential may be given.
    rollout_BT = -torch.rand(3, 4, generator=generator, dtype=torch.float64)
    ratio_BT = torch.linspace(0.3, 3.5, 12, dtype=torch.float64).view(3, 4)
    old_BT = rollout_BT + ratio_BT.log()
    old_BT[2, 0] = rollout_BT[2, 0] + 900.0
    batch = UpdateBatch(rows=3, tokens=7, ranks=1, old_log_probs_BT=old_BT, rollout_log_probs_BT=rollout_BT)
    return divergence_BT.requires_grad_(), mask_BT, batch


def test_the_token_mean_weighs_every_token_of_the_update_alike() -> None:
    method = build(load("ablations/vision_opd_token_mean", []).method)
    assert not method.needs_old_log_probs
    divergence_BT, mask_BT, batch = responses()
    loss = method.loss({"divergence": divergence_BT}, mask_BT, batch)
    tokens = [divergence_BT[b, t].item() for b, t in mask_BT.nonzero().tolist()]
    assert loss.item() == pytest.approx(sum(tokens) / 7, rel=1e-12)
    per_row = build(MODULE).loss({"divergence": divergence_BT}, mask_BT, batch)
    assert loss.item() != pytest.approx(per_row.item(), rel=1e-3)


def written_out(limit: float) -> float:
    """The authors' loss token by token."""
    divergence_BT, mask_BT, batch = responses()
    total = 0.0
    for b, t in mask_BT.nonzero().tolist():
        log_ratio = (batch.old_log_probs_BT[b, t] - batch.rollout_log_probs_BT[b, t]).item()
        total += divergence_BT[b, t].item() * min(math.exp(min(log_ratio, 20.0)), limit)
    return total / 7


def check_weights_are_truncated_at_2(method: Method) -> None:
    divergence_BT, mask_BT, batch = responses()
    loss = method.loss({"divergence": divergence_BT}, mask_BT, batch)
    assert loss.item() == pytest.approx(written_out(2.0), rel=1e-12)
    (gradient_BT,) = torch.autograd.grad(loss, divergence_BT)
    assert gradient_BT.max().item() == pytest.approx(2.0 / 7)


def test_the_authors_script_weights_tokens_by_the_ratio_to_the_rollouts_policy_up_to_2() -> None:
    check_weights_are_truncated_at_2(script())


@pytest.mark.parametrize("limit", [None, 3.0, math.inf])
def test_importance_twin_weights_that_are_not_truncated_at_2_are_seen(limit: float | None) -> None:
    with pytest.raises(AssertionError):
        check_weights_are_truncated_at_2(script(importance_limit=limit))


def test_the_authors_script_is_verls_rollout_correction_and_token_mean() -> None:
    from verl.trainer.ppo.core_algos import agg_loss
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    divergence_BT, mask_BT, batch = responses()
    log_ratio_BT = batch.old_log_probs_BT - batch.rollout_log_probs_BT
    weights_BT, _ = compute_rollout_correction_weights(log_ratio_BT, mask_BT, "token", 2.0)
    theirs = agg_loss(divergence_BT * weights_BT, mask_BT, "token-mean", dp_size=1, batch_num_tokens=7)
    ours = script().loss({"divergence": divergence_BT}, mask_BT, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_no_gradient_goes_through_the_weights() -> None:
    method = script()
    assert method.needs_old_log_probs
    divergence_BT, mask_BT, batch = responses()
    old_BT = batch.old_log_probs_BT.requires_grad_()
    batch = dataclasses.replace(batch, old_log_probs_BT=old_BT)
    loss = method.loss({"divergence": divergence_BT}, mask_BT, batch)
    assert torch.autograd.grad(loss, old_BT, allow_unused=True) == (None,)


def test_without_the_settings_of_the_script_the_loss_is_the_same_to_the_bit() -> None:
    divergence_BT, mask_BT, batch = responses()
    loss = build(MODULE).loss({"divergence": divergence_BT}, mask_BT, batch)
    assert torch.equal(loss, sequence_mean(divergence_BT, mask_BT, batch))


def test_weights_without_log_probs_of_the_rollout_are_refused_with_a_sentence() -> None:
    divergence_BT, mask_BT, batch = responses()
    batch = dataclasses.replace(batch, rollout_log_probs_BT=None)
    with pytest.raises(
        UserError, match=r"these rollouts have no log-probs; set method\.importance_limit=null"
    ):
        script().loss({"divergence": divergence_BT}, mask_BT, batch)


def test_a_teacher_that_is_the_student_teaches_nothing() -> None:
    given = chunk()
    same = ScoreChunk(
        given.student_logits_CV, {"teacher": given.student_logits_CV.detach()}, given.tokens_C, {}
    )
    divergence_C = build({**MODULE, "top_k": 3}).score(same)["divergence"]
    (gradient_CV,) = torch.autograd.grad(divergence_C.sum(), given.student_logits_CV)
    assert divergence_C.abs().max() < 1e-12
    assert gradient_CV.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"teacher": "old"}, "method.teacher=old is not allowed; give one of current"),
        ({"teacher_view": "zoom"}, "method.teacher_view=zoom is not allowed; give one of full"),
        ({"teacher_rate": 0.0}, "method.teacher_rate=0.0 is not allowed; give above 0 to 1"),
        ({"top_k": "many"}, "method.top_k"),
        ({"aggregation": "mean"}, "method.aggregation=mean is not allowed; give one of sequence_mean"),
        ({"importance_limit": 0.0}, "method.importance_limit=0.0 is not allowed; give above 0"),
    ],
)
def test_bad_settings_are_refused_with_a_sentence(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build({**MODULE, **settings})


def test_the_record_states_anchor_objective_and_normalisation() -> None:
    record = build({**MODULE, "top_k": 20}).record()
    assert record == {
        "anchor": "ema(0.05) on crop",
        "objective": "JSD 0.5, student top-20 + tail",
        "normalisation": "per-sequence mean",
        "clip": "none",
    }


@pytest.mark.parametrize(
    ("settings", "key", "said"),
    [
        ({"teacher": "current"}, "anchor", "current on crop"),
        ({"teacher": "trust_region"}, "anchor", "trust_region(0.05) on crop"),
        ({"beta": 0.0}, "objective", "forward KL, student top-20 + tail"),
        ({"beta": 1.0}, "objective", "reverse KL, student top-20 + tail"),
        ({"aggregation": "token_mean"}, "normalisation", "token mean"),
        ({"importance_limit": 2.0}, "clip", "importance weights to the rollout's policy, at most 2"),
    ],
)
def test_the_record_names_what_an_ablation_is(settings: dict[str, object], key: str, said: str) -> None:
    assert build({**MODULE, "top_k": 20, **settings}).record()[key] == said
