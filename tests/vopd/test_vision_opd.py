"""Vision-OPD in the contract: the paper's defaults, its loss as the formula says it, and what it refuses."""

import pytest
import torch

from vopd.errors import UserError
from vopd.method import ScoreChunk, UpdateBatch, build, default_settings
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
    ],
)
def test_the_record_names_what_an_ablation_is(settings: dict[str, object], key: str, said: str) -> None:
    assert build({**MODULE, "top_k": 20, **settings}).record()[key] == said
