"""OPSD, SFT on the self-teacher and the sampled-token variant against their formulas in plain torch."""

import pytest
import torch

from vopd.backbone.step_rows import row_fields, step_rollouts
from vopd.config import load
from vopd.errors import UserError
from vopd.method import Method, ScoreChunk, UpdateBatch, build, final_views


def method_of(recipe: str) -> Method:
    return build(dict(load(recipe, []).method))


def chunk(rows: int = 4, vocabulary: int = 12) -> ScoreChunk:
    torch.manual_seed(0)
    student_CV = torch.randn(rows, vocabulary, dtype=torch.float64, requires_grad=True)
    teacher_CV = 2 * torch.randn(rows, vocabulary, dtype=torch.float64)
    return ScoreChunk(student_CV, {"teacher": teacher_CV}, torch.arange(rows), {})


def test_opsd_is_the_jsd_towards_a_hinted_moving_average() -> None:
    method = build({"module": "baselines.opsd", "top_k": 12})
    teacher = method.scorers["teacher"]
    assert (teacher.view, teacher.weights, teacher.rate) == ("answer_hint", "ema", 0.05)
    given = chunk()
    p_CV, q_CV = given.student_logits_CV.softmax(-1), given.scorer_logits["teacher"].softmax(-1)
    m_CV = (p_CV + q_CV) / 2
    wanted_C = ((p_CV * (p_CV / m_CV).log()).sum(-1) + (q_CV * (q_CV / m_CV).log()).sum(-1)) / 2
    torch.testing.assert_close(method.score(given)["divergence"], wanted_C)


def test_the_original_clips_each_entry_of_a_full_forward_kl_to_a_frozen_teacher() -> None:
    method = method_of("opsd_original")
    assert method.scorers["teacher"].weights == "initial"
    given = chunk()
    log_p, log_q = given.student_logits_CV.log_softmax(-1), given.scorer_logits["teacher"].log_softmax(-1)
    terms_CV = log_q.exp() * (log_q - log_p)
    assert (terms_CV > 0.05).any() and (terms_CV < 0.05).any()
    scored = method.score(given)["divergence"]
    torch.testing.assert_close(scored, torch.minimum(terms_CV, torch.tensor(0.05)).sum(-1))
    (gradient_CV,) = torch.autograd.grad(scored.sum(), given.student_logits_CV, retain_graph=True)
    passing_CV = (log_q.exp() * (terms_CV < 0.05)).detach()
    torch.testing.assert_close(
        gradient_CV, passing_CV.sum(-1, keepdim=True) * log_p.exp().detach() - passing_CV
    )


def test_a_temperature_divides_the_logits_of_student_and_teacher() -> None:
    method, given = method_of("ablations/opsd_original_temperature_1_1"), chunk()
    assert method.record()["objective"] == "forward KL, full vocabulary, logits / 1.1"
    p_CV = (given.student_logits_CV.exp() ** (1 / 1.1)).detach()
    q_CV = given.scorer_logits["teacher"].exp() ** (1 / 1.1)
    p_CV, q_CV = p_CV / p_CV.sum(-1, keepdim=True), q_CV / q_CV.sum(-1, keepdim=True)
    terms_CV = q_CV * (q_CV / p_CV).log()
    scored = method.score(given)["divergence"]
    torch.testing.assert_close(scored, terms_CV.clamp(max=0.05).sum(-1))
    (gradient_CV,) = torch.autograd.grad(scored.sum(), given.student_logits_CV)
    passing_CV = q_CV * (terms_CV < 0.05)
    torch.testing.assert_close(gradient_CV, (passing_CV.sum(-1, keepdim=True) * p_CV - passing_CV) / 1.1)


def test_the_original_has_no_temperature_and_a_temperature_of_1_changes_no_bit() -> None:
    assert method_of("opsd_original").settings.temperature == 1.0
    given = chunk()
    tempered = build({**load("opsd_original", []).method, "temperature": 1.0}).score(given)["divergence"]
    student_CV, teacher_CV = given.student_logits_CV.detach(), given.scorer_logits["teacher"]
    log_p, log_q = (x - x.logsumexp(-1, keepdim=True) for x in (student_CV, teacher_CV))
    assert torch.equal(tempered, (log_q.exp() * (log_q - log_p)).clamp(max=0.05).sum(-1))


def test_a_temperature_without_the_clip_is_refused() -> None:
    with pytest.raises(UserError, match=r"set method\.clip"):
        build({"module": "baselines.opsd", "temperature": 1.1})


def test_a_clip_without_the_full_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match=r"method\.top_k=null"):
        build({"module": "baselines.opsd", "clip": 0.05})


def test_the_hinted_teachers_own_accuracy_is_evaluated() -> None:
    assert final_views(method_of("opsd")) == ["full", "crop", "answer_hint"]
    assert final_views(method_of("ablations/opsd_option_text"))[-1] == "answer_hint_text"


def test_sft_keeps_correct_answers_that_ended_and_generates_them_first_from_the_crop() -> None:
    method = method_of("sft_self_teacher")
    assert (method.rollout.view, method.rollout.weights, method.student_view) == ("crop", "initial", "full")
    records = [
        {"correct": c, "truncated": t, "response_tokens": 3}
        for c, t in ((True, False), (True, True), (False, False), (False, True))
    ]
    fields = row_fields(method, step_rollouts(["0_0_0", "0_1_0", "1_0_0", "1_1_0"], records, 10))
    assert set(fields) == {"kept"} and fields["kept"].tolist() == [True, False, False, False]


def test_sft_loss_is_the_cross_entropy_per_kept_answer() -> None:
    method, given = method_of("sft_self_teacher"), chunk(6)
    scored = method.score(given)["log_prob"]
    nll_C = torch.nn.functional.cross_entropy(given.student_logits_CV, given.tokens_C, reduction="none")
    mask_BT = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])  # the second row is not kept
    loss = method.loss({"log_prob": scored.view(2, 3)}, mask_BT, UpdateBatch(rows=1, tokens=3, ranks=1))
    torch.testing.assert_close(loss, nll_C[:3].mean())


def test_the_sampled_tokens_gradient_is_on_average_that_of_the_reverse_kl() -> None:
    method = method_of("ablations/vision_opd_sampled_token")
    torch.manual_seed(0)
    student_V = torch.randn(5, dtype=torch.float64).requires_grad_()
    teacher_V = torch.randn(5, dtype=torch.float64)
    p_V = student_V.softmax(-1)
    kl = (p_V * (p_V.log() - teacher_V.log_softmax(-1))).sum()
    (wanted_V,) = torch.autograd.grad(kl, student_V, retain_graph=True)
    mean_V = torch.zeros(5, dtype=torch.float64)
    for token in range(5):
        given = ScoreChunk(student_V[None].clone(), {"teacher": teacher_V[None]}, torch.tensor([token]), {})
        per_token = {k: v[None] for k, v in method.score(given).items()}
        loss = method.loss(per_token, torch.ones(1, 1), UpdateBatch(1, 1, 1))
        mean_V += p_V[token].detach() * torch.autograd.grad(loss, student_V, retain_graph=True)[0]
    torch.testing.assert_close(mean_V, wanted_V)
