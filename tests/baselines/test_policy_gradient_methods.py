"""GRPO and DAPO against their formulas written out in plain torch, and the pieces that are their own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.dapo import overlong_penalty
from vopd.backbone import policy_gradient
from vopd.backbone.step_rows import row_fields, step_rollouts
from vopd.method import ADVANTAGES, Rollouts, ScoreChunk, UpdateBatch, build, final_views

LENGTHS = [3, 5, 2, 4]
MASK_BT = (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).double()


def rollouts(correct: list[bool], lengths: list[int] = LENGTHS, limit: int = 10) -> Rollouts:
    keys = [f"{i // 2}_{i % 2}_0" for i in range(len(correct))]
    records = [
        {"correct": c, "truncated": n >= limit, "response_tokens": n}
        for c, n in zip(correct, lengths, strict=True)
    ]
    return step_rollouts(keys, records, limit)


def played(
    name: str, old_shift: float = 0.3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss of a recipe's method and its gradient; log-probs and advantages to recompute it from."""
    torch.manual_seed(0)
    method = build({"module": f"baselines.{name}"})
    log_prob_BT = -torch.rand(4, 5, dtype=torch.float64).requires_grad_()
    log_prob_BT.retain_grad() if not log_prob_BT.is_leaf else None
    old_BT = log_prob_BT.detach() + old_shift * torch.randn(4, 5, dtype=torch.float64)
    advantages_BT = torch.randn(4, 1, dtype=torch.float64).expand(4, 5)
    batch = UpdateBatch(4, sum(LENGTHS), 1, advantages_BT=advantages_BT, old_log_probs_BT=old_BT)
    loss = method.loss({"log_prob": log_prob_BT}, MASK_BT, batch)
    return loss, log_prob_BT, old_BT, advantages_BT


@pytest.mark.parametrize(("name", "high"), [("grpo", 0.2), ("dapo", 0.28)])
def test_loss_and_gradient_are_the_formulas(name: str, high: float) -> None:
    loss, log_prob_BT, old_BT, advantages_BT = played(name)
    (gradient_BT,) = torch.autograd.grad(loss, log_prob_BT)
    again_BT = log_prob_BT.detach().requires_grad_()
    terms = []
    for i, length in enumerate(LENGTHS):
        row = []
        for t in range(length):
            ratio = (again_BT[i, t] - old_BT[i, t]).exp()
            a = advantages_BT[i, t]
            term = torch.minimum(ratio * a, ratio.clamp(0.8, 1 + high) * a)
            row.append(-torch.maximum(term, 3 * a) if a < 0 else -term)  # verl's dual clip
        terms.append(torch.stack(row))
    if name == "grpo":
        wanted = torch.stack([row.mean() for row in terms]).mean()
    else:
        wanted = torch.cat(terms).mean()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradient_BT, torch.autograd.grad(wanted, again_BT)[0])
    clipped = (gradient_BT == 0) & (MASK_BT > 0)
    assert clipped.any() and not clipped[MASK_BT > 0].all()


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_gradient_equals_finite_differences(name: str) -> None:
    method = build({"module": f"baselines.{name}"})
    torch.manual_seed(1)
    old_BT = -torch.rand(4, 5, dtype=torch.float64)
    batch = UpdateBatch(
        4, sum(LENGTHS), 1, torch.randn(4, 1, dtype=torch.float64).expand(4, 5), old_log_probs_BT=old_BT
    )
    now_BT = (old_BT + 0.05 * torch.randn(4, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: method.loss({"log_prob": x}, MASK_BT, batch), now_BT)


@pytest.mark.parametrize("name", ["grpo", "dapo"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_shares_of_any_split_add_up(name: str, ranks: int) -> None:
    whole, log_prob_BT, old_BT, advantages_BT = played(name)
    method = build({"module": f"baselines.{name}"})
    shares = [
        method.loss(
            {"log_prob": log_prob_BT[i : i + 1]},
            MASK_BT[i : i + 1],
            UpdateBatch(4, sum(LENGTHS), ranks, advantages_BT[i : i + 1], old_BT[i : i + 1]),
        )
        for i in range(4)
    ]
    torch.testing.assert_close(sum(shares) / ranks, whole)


def test_advantages_are_the_z_scores_of_the_group() -> None:
    fields = row_fields(build({"module": "baselines.grpo"}), rollouts([True, False, True, True]))
    rows = [row.tolist() for row in fields["advantages"].unbind()]
    assert [len(row) for row in rows] == LENGTHS
    std = torch.tensor([1.0, 0.0]).std().item()
    assert rows[0] == pytest.approx([0.5 / std] * 3, rel=1e-5)
    assert rows[1] == pytest.approx([-0.5 / std] * 5, rel=1e-5)
    assert rows[2] == [0, 0] and rows[3] == [0, 0, 0, 0]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_every_advantage_of_the_contract_is_registered_in_verl_and_takes_what_we_have(name: str) -> None:
    mask_BT = MASK_BT.float()
    advantages_BT = policy_gradient.advantages(
        name, torch.tensor([1.0, 0.0, 0.5, 0.25]), torch.tensor([0, 0, 1, 1]), mask_BT
    )
    assert advantages_BT.shape == mask_BT.shape and torch.isfinite(advantages_BT).all()
    assert (advantages_BT[0, :3] > 0).all() and (advantages_BT * (1 - mask_BT)).abs().max() == 0


def test_kl_is_k3_to_the_initial_weights_and_reaches_the_loss() -> None:
    method = build({"module": "baselines.grpo", "kl": 0.04})
    (reference,) = method.scorers.values()
    assert (reference.view, reference.weights) == ("full", "initial")
    torch.manual_seed(0)
    student_CV = torch.randn(3, 7, dtype=torch.float64).requires_grad_()
    reference_CV, tokens_C = torch.randn(3, 7, dtype=torch.float64), torch.tensor([1, 4, 2])
    scored = method.score(ScoreChunk(student_CV, {"reference": reference_CV}, tokens_C, {}))
    r_C = (reference_CV.log_softmax(-1) - student_CV.log_softmax(-1)).gather(1, tokens_C[:, None])[:, 0]
    torch.testing.assert_close(scored["kl"], r_C.exp() - r_C - 1)
    per_token = {k: v[None] for k, v in scored.items()}
    batch = UpdateBatch(1, 3, 1, torch.zeros(1, 3), scored["log_prob"].detach()[None])
    loss = method.loss(per_token, torch.ones(1, 3), batch)
    torch.testing.assert_close(loss, 0.04 * scored["kl"].mean())
    assert torch.autograd.grad(loss, student_CV)[0].abs().max() > 0


def test_rewards_are_the_rules_verdict_for_grpo() -> None:
    given = rollouts([True, False, True, True])
    assert build({"module": "baselines.grpo"}).rewards(given).tolist() == [1, 0, 1, 1]


def test_overlong_penalty_is_the_papers() -> None:
    lengths_B = torch.tensor([1, 32, 34, 36, 39, 40, 40])
    truncated_B = torch.tensor([False] * 6 + [True])
    penalty_B = overlong_penalty(lengths_B, truncated_B, 40, 0.2)
    assert penalty_B.tolist() == pytest.approx([0, 0, -0.25, -0.5, -0.875, -1, -1])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_overlong_penalty_is_verls(lengths: list[int]) -> None:
    """verl's DAPO reward manager: min(-(length - (limit - buffer)) / buffer * factor, 0)."""
    penalty_B = overlong_penalty(torch.tensor(lengths), torch.zeros(len(lengths), dtype=torch.bool), 40, 0.2)
    assert penalty_B.tolist() == pytest.approx([min(-(n - 32) / 8, 0.0) for n in lengths])


def test_dapo_rewards_are_one_and_minus_one_and_filters_on_correctness() -> None:
    method = build({"module": "baselines.dapo"})
    given = rollouts([True, False, True, False], [3, 5, 9, 10])
    assert method.rewards(given).tolist() == pytest.approx([1, -1, 1 - 0.5, -1 - 1])
    assert method.rollout.filter_groups and method.rollout.weights == "current"


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_the_record_states_what_a_table_needs(name: str) -> None:
    method = build({"module": f"baselines.{name}"})
    assert set(method.record()) == {"anchor", "objective", "normalisation", "clip"}
    assert method.record()["anchor"] == "none" and final_views(method) == ["full", "crop"]
