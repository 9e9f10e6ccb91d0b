"""The scoring head against plain autograd on all logits at once; its memory, its checkpoints, FSDP2, Qwen3.5.

Run as a script (`python test_head.py RANK RANKS DIRECTORY`) this file is one rank of the FSDP2 test.
"""

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointError, checkpoint

import vopd.backbone.head as head_module
from vopd.backbone.head import GatherContext, ScoringHead, active, install_head
from vopd.backbone.projection import Logits
from vopd.backbone.scoring import Component, Score, ScoringContext
from vopd.divergence import (
    bucketed_log_probs,
    divergence,
    entropy,
    sampled_token_log_prob,
    student_top_k,
    top_k_tail_divergence,
)
from vopd.method import ScoreChunk

N, H, V = 37, 16, 101
NAMES = ("divergence", "log_prob", "weighted", "entropy")


def score(chunk: ScoreChunk) -> dict[str, Tensor]:
    """One output of each kind: closed-form, plain autograd, with extras, without gradient; in another order."""
    log_prob_C = sampled_token_log_prob(chunk.student_logits_CV, chunk.tokens_C)
    with torch.no_grad():
        entropy_C = entropy(chunk.student_logits_CV)
    return {
        "entropy": entropy_C,
        "log_prob": log_prob_C,
        "weighted": log_prob_C.exp() * chunk.extras["weight"][:, 0],
        "divergence": top_k_tail_divergence(
            chunk.student_logits_CV, chunk.scorer_logits["teacher"], 10, 0.5
        ).divergence_T,
    }


def _context(
    positions: int = N, chunk: int = 8, seed: int = 1, dtype: torch.dtype = torch.float64
) -> ScoringContext:
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    return ScoringContext(
        score=score,
        names=NAMES,
        tokens_N=torch.randint(0, V, (positions,), generator=generator),
        chunk=chunk,
        scorers={"teacher": (Component(random(positions, H), random(V, H)),)},
        extras={"weight": random(positions, 2)},
    )


def _unchunked(hidden_NH: Tensor, weight_VH: Tensor, context: ScoringContext) -> Tensor:
    """All logits at once, autograd throughout (the divergence too)."""
    logits_NV = hidden_NH @ weight_VH.T
    (teacher,) = context.scorers["teacher"]
    teacher_NV = teacher.hidden_NH @ teacher.weight_VH.T
    support_NK = logits_NV.detach().argsort(-1, descending=True)[:, :10]
    outside_NK = logits_NV.detach().argsort(-1, descending=True)[:, 10:]
    buckets = [
        torch.cat([x.gather(-1, support_NK), x.gather(-1, outside_NK).logsumexp(-1, keepdim=True)], -1)
        for x in (teacher_NV.log_softmax(-1), logits_NV.log_softmax(-1))
    ]
    log_probs_NV = logits_NV.log_softmax(-1)
    log_prob_N = log_probs_NV[torch.arange(len(log_probs_NV)), context.tokens_N]
    entropy_N = -(log_probs_NV.exp() * log_probs_NV).sum(-1).detach()
    weighted_N = log_prob_N.exp() * context.extras["weight"][:, 0]
    return torch.stack([divergence(*buckets, 0.5), log_prob_N, weighted_N, entropy_N], -1)


def _inputs(positions: int = N, dtype: torch.dtype = torch.float64) -> tuple[Tensor, nn.Parameter, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(positions, H, generator=generator, dtype=dtype).requires_grad_()
    weight_VH = nn.Parameter(torch.randn(V, H, generator=generator, dtype=dtype))
    return hidden_NH, weight_VH, torch.randn(positions, len(NAMES), generator=generator, dtype=dtype)


def _expected(positions: int = N) -> tuple[Tensor, Tensor, Tensor]:
    hidden_NH, weight_VH, upstream_NM = _inputs(positions)
    numbers_NM = _unchunked(hidden_NH, weight_VH, _context(positions))
    return numbers_NM.detach(), *torch.autograd.grad((numbers_NM * upstream_NM).sum(), (hidden_NH, weight_VH))


# --- values and gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 8, N - 1, N, N + 5])
def test_chunked_equals_unchunked_autograd(chunk: int) -> None:
    hidden_NH, weight_VH, upstream_NM = _inputs()
    head = ScoringHead(weight_VH)
    with active(head, _context(chunk=chunk)):
        numbers = head(hidden_NH.unsqueeze(0))
    assert numbers.shape == (1, N, len(NAMES))
    (numbers[0] * upstream_NM).sum().backward()  # the context is no longer active
    value, grad_hidden, grad_weight = _expected()
    torch.testing.assert_close(numbers[0].detach(), value, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(hidden_NH.grad, grad_hidden, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(weight_VH.grad, grad_weight, rtol=1e-11, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 25), st.lists(st.integers(0, 59), max_size=20))
def test_any_positions_and_chunk(chunk: int, positions: list[int]) -> None:
    """positions_N picks rows of the flattened batch, in its order, repeats included."""
    batch = torch.randn(3, 20, H, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    _, weight_VH, _ = _inputs()
    head = ScoringHead(weight_VH)
    context = _context(len(positions), chunk)
    context.positions_N = torch.tensor(positions, dtype=torch.long)
    with active(head, context):
        numbers = head(batch)
    torch.testing.assert_close(numbers[0], _unchunked(batch.view(60, H)[positions], weight_VH, context))
    with active(head, GatherContext(context.positions_N)):
        assert torch.equal(head(batch), batch.view(1, 60, H)[:, positions])


def test_gradients_at_shared_positions_are_the_same_each_time() -> None:
    """Same seed, same CPU result: also where two threads add to one position, as for a prompt with many rollouts."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 400, 256, generator=generator)
    positions_N = torch.randint(0, 20, (300,), generator=generator)
    weights_NH = torch.randn(300, 256, generator=generator)

    def gradient() -> Tensor:
        leaf = hidden.clone().requires_grad_()
        head_module._at_positions(leaf, positions_N).backward(weights_NH)
        assert leaf.grad is not None
        return leaf.grad

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gradients = [gradient() for _ in range(100)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradients[0], other) for other in gradients)


def test_weight_tied_to_the_embedding_gets_both_gradients() -> None:
    ids = torch.randint(0, V, (1, N), generator=torch.Generator().manual_seed(2))

    def gradient(numbers_of: Callable[[Tiny, Tensor], Tensor]) -> Tensor:
        model = Tiny(tied=True).double()
        assert model.lm_head.weight is model.embed_tokens.weight
        (numbers_of(model, model.hidden(ids)) * _inputs()[2]).sum().backward()
        return model.embed_tokens.weight.grad

    def chunked(model: Tiny, hidden: Tensor) -> Tensor:
        head = install_head(model)
        assert head.weight is model.embed_tokens.weight
        assert "lm_head.weight" not in dict(model.named_parameters())  # still one parameter
        with active(head, _context()):
            return model.lm_head(hidden)[0]

    expected = gradient(lambda model, hidden: _unchunked(hidden[0], model.lm_head.weight, _context()))
    torch.testing.assert_close(gradient(chunked), expected, rtol=1e-11, atol=1e-12)


def test_without_context_it_is_the_linear_layer() -> None:
    hidden_NH, weight_VH, _ = _inputs()
    head = ScoringHead(weight_VH)
    plain = nn.functional.linear(hidden_NH, weight_VH)
    assert torch.equal(head(hidden_NH), plain)
    with pytest.raises(RuntimeError, match="on purpose"), active(head, _context()):
        raise RuntimeError("on purpose")
    assert torch.equal(head(hidden_NH), plain)
    with active(head, _context()):
        with active(head, GatherContext()):
            assert head(hidden_NH[None]).shape == (1, N, H)
        assert head(hidden_NH[None]).shape == (1, N, len(NAMES))
    assert [name for name, _ in head.named_parameters()] == ["weight"]


def test_no_response_position_gives_empty_numbers_and_zero_gradients() -> None:
    hidden_NH, weight_VH, _ = _inputs(0)
    head = ScoringHead(weight_VH)
    with active(head, _context(0)):
        numbers = head(hidden_NH.unsqueeze(0))
    assert numbers.shape == (1, 0, len(NAMES))
    numbers.sum().backward()
    assert hidden_NH.grad.shape == (0, H)
    assert torch.equal(weight_VH.grad, torch.zeros(V, H, dtype=torch.float64))


def test_a_score_without_any_gradient_is_fine() -> None:
    hidden_NH, weight_VH, _ = _inputs()
    head = ScoringHead(weight_VH)
    context = _context()
    context.score, context.names = (lambda chunk: {"one": torch.ones(len(chunk.tokens_C))}), ("one",)
    with active(head, context):
        head(hidden_NH[None]).sum().backward()
    assert hidden_NH.grad.abs().max() == 0
    with torch.no_grad(), active(head, _context()):
        assert not head(hidden_NH[None]).requires_grad


def test_mixture_is_the_normalised_geometric_mean() -> None:
    """p proportional to p_a^(1-a) p_b^a, the trust-region teacher; one component alone keeps its logits."""
    context = _context()
    a, b = context.scorers["teacher"][0], _context(seed=9).scorers["teacher"][0]
    a.weight_VH.requires_grad_()  # as the student's own head has, when it is the scorer
    seen: list[Tensor] = []

    def spy(chunk: ScoreChunk) -> dict[str, Tensor]:
        assert not any(logits.requires_grad for logits in chunk.scorer_logits.values())
        seen.append(
            torch.stack([chunk.scorer_logits[name].softmax(-1) for name in ("mixed", "same", "alone")])
        )
        return {"zero": chunk.student_logits_CV.sum(-1) * 0}

    hidden_NH, weight_VH, _ = _inputs()
    head = ScoringHead(weight_VH)
    scorers = {
        "mixed": (Component(a.hidden_NH, a.weight_VH, 0.7), Component(b.hidden_NH, b.weight_VH, 0.3)),
        "same": (Component(a.hidden_NH, a.weight_VH, 0.4), Component(a.hidden_NH, a.weight_VH, 0.6)),
        "alone": (a,),
    }
    with active(head, ScoringContext(spy, ("zero",), context.tokens_N, 8, scorers)):
        head(hidden_NH[None]).sum().backward()
    assert len(seen) == 5  # once per chunk: the backward has what it needs
    forward = torch.cat(seen, 1)
    assert a.weight_VH.grad is None
    p_a, p_b = ((x.hidden_NH @ x.weight_VH.T).softmax(-1) for x in (a, b))
    mixed = p_a**0.7 * p_b**0.3
    torch.testing.assert_close(forward[0], mixed / mixed.sum(-1, keepdim=True))
    torch.testing.assert_close(forward[1], p_a)
    torch.testing.assert_close(forward[2], p_a)


def test_half_precision_operands_are_projected_in_float32() -> None:
    """bfloat16 weights (mixed precision), float32 logits: what the numbers equal is the float32 product."""
    hidden_NH, weight_VH, upstream_NM = _inputs(dtype=torch.float32)
    hidden16, weight16 = (
        hidden_NH.detach().bfloat16().requires_grad_(),
        nn.Parameter(weight_VH.detach().bfloat16()),
    )
    hidden32, weight32 = (x.detach().float().requires_grad_() for x in (hidden16, weight16))
    context = _context(dtype=torch.float32)
    head = ScoringHead(weight16)
    with active(head, context):
        numbers = head(hidden16[None])[0]
    expected = _unchunked(hidden32, weight32, context)
    assert numbers.dtype == torch.float32
    torch.testing.assert_close(numbers, expected, rtol=1e-4, atol=1e-5)
    (numbers * upstream_NM).sum().backward()
    grads = torch.autograd.grad((expected * upstream_NM).sum(), (hidden32, weight32))
    for tensor, grad in ((hidden16, grads[0]), (weight16, grads[1])):
        assert tensor.grad.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.grad.float(), grad, rtol=2**-7, atol=1e-4)


def test_autocast_does_not_round_the_logits() -> None:
    hidden_NH, weight_VH, upstream_NM = _inputs(dtype=torch.float32)
    head = ScoringHead(weight_VH)

    def run(enabled: bool) -> tuple[Tensor, Tensor]:
        hidden = hidden_NH.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert head(hidden).dtype == (torch.bfloat16 if enabled else torch.float32)  # autocast is at work
            with active(head, _context(dtype=torch.float32)):
                numbers = head(hidden[None])[0]
            (numbers * upstream_NM).sum().backward()
        return numbers.detach(), hidden.grad

    for plain, autocast in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, autocast)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: bfloat16 matmul with float32 result")
def test_cuda_bfloat16_keeps_float32_logits() -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(64, 256, generator=generator).cuda().bfloat16().requires_grad_()
    weight = nn.Parameter(torch.randn(1000, 256, generator=generator).cuda().bfloat16())
    tokens = torch.randint(0, 1000, (64,), generator=generator).cuda()
    head = ScoringHead(weight)
    one = lambda chunk: {"log_prob": sampled_token_log_prob(chunk.student_logits_CV, chunk.tokens_C)}  # noqa: E731
    with active(head, ScoringContext(one, ("log_prob",), tokens, 10)):
        numbers = head(hidden[None])[0, :, 0]
    hidden32, weight32 = (x.detach().float().requires_grad_() for x in (hidden, weight))
    expected = sampled_token_log_prob(hidden32 @ weight32.T, tokens)
    torch.testing.assert_close(numbers, expected, rtol=1e-4, atol=1e-4)
    numbers.mean().backward()
    expected.mean().backward()
    for low, full in ((hidden, hidden32), (weight, weight32)):
        assert (low.grad.float() - full.grad).norm() < 0.02 * full.grad.norm()


# --- what the backward does again -------------------------------------------------------------------


class _Products(TorchDispatchMode):
    """How many products had a chunk of logits as their result, and how many were added to the weight's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.weight_gradients = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += func.name().startswith("aten::mm") and result.shape[-1] == V
        self.weight_gradients += func.name().startswith("aten::addmm")
        return result


def _calls_and_products(score_of_chunk: Score, chunk: int) -> tuple[list[int], list[int]]:
    """Calls of score and projections, in the forward and in the backward; gradients are checked."""
    hidden_NH, weight_VH, upstream_NM = _inputs()
    head = ScoringHead(weight_VH)
    context = _context(chunk=chunk)
    calls = []

    def counted(chunk: ScoreChunk) -> dict[str, Tensor]:
        calls.append(len(chunk.tokens_C))
        return score_of_chunk(chunk)

    context.score = counted
    with _Products() as forward, active(head, context):
        numbers = head(hidden_NH[None])[0]
    in_forward = len(calls)
    with _Products() as backward:
        (numbers * upstream_NM).sum().backward()
    _, grad_hidden, grad_weight = _expected()
    torch.testing.assert_close(hidden_NH.grad, grad_hidden, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(weight_VH.grad, grad_weight, rtol=1e-11, atol=1e-12)
    assert backward.weight_gradients == in_forward
    return [in_forward, len(calls) - in_forward], [forward.count, backward.count]


def _composed(chunk: ScoreChunk) -> dict[str, Tensor]:
    """The same numbers from plain operations, of which autograd keeps several of the size of the logits."""
    student_CV, teacher_CV = chunk.student_logits_CV, chunk.scorer_logits["teacher"]
    support_CK = student_top_k(student_CV, 10)
    buckets = [bucketed_log_probs(x, support_CK) for x in (teacher_CV, student_CV)]
    log_probs_CV = student_CV.log_softmax(-1)
    return score(chunk) | {
        "divergence": divergence(*buckets, 0.5),
        "log_prob": log_probs_CV.gather(-1, chunk.tokens_C[:, None])[:, 0],
    }


def test_the_backward_projects_the_student_alone_and_not_the_last_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chunks = -(-N // 8)
    # A support of 10 of 101 tokens is much; of 152k it is nothing.
    monkeypatch.setattr(Logits, "bytes_of_chunk", lambda _: 10**6)
    assert _calls_and_products(score, 8) == ([chunks, 0], [2 * chunks, chunks - 1])
    assert _calls_and_products(score, N) == ([1, 0], [2, 0])


def test_a_score_that_keeps_much_runs_again() -> None:
    chunks = -(-N // 8)
    assert _calls_and_products(_composed, 8) == ([chunks, chunks], [2 * chunks, 2 * chunks - 1])


def test_a_frozen_head_has_no_gradient_and_makes_none() -> None:
    hidden_NH, weight_VH, upstream_NM = _inputs()
    weight_VH.requires_grad_(False)
    head = ScoringHead(weight_VH)
    with _Products() as products:
        with active(head, _context()):
            numbers = head(hidden_NH[None])[0]
        (numbers * upstream_NM).sum().backward()
    torch.testing.assert_close(hidden_NH.grad, _expected()[1], rtol=1e-11, atol=1e-12)
    assert weight_VH.grad is None
    assert products.weight_gradients == 0


def test_a_graph_without_a_backward_is_freed_and_a_second_backward_is_refused() -> None:
    hidden_NH, weight_VH, _ = _inputs()
    head = ScoringHead(weight_VH)
    context = _context()
    teacher = weakref.ref(context.scorers["teacher"][0].weight_VH)
    with active(head, context):
        numbers = head(hidden_NH[None])
    del context, numbers
    assert teacher() is None
    with active(head, _context()):
        numbers = head(hidden_NH[None]).sum()
    numbers.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward again"):
        numbers.backward()


# --- memory -----------------------------------------------------------------------------------------


class _ShapeRecorder(TorchDispatchMode):
    """Shapes of all results, forward and backward, that have the vocabulary as a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(x.shape) for x in tree_leaves(result) if isinstance(x, Tensor) and V in x.shape}
        return result


def _check_no_more_than_a_chunk_of_logits(chunk: int, limit: int) -> None:
    hidden_NH, weight_VH, upstream_NM = _inputs()
    head = ScoringHead(weight_VH)
    context = _context(chunk=chunk)
    teacher = context.scorers["teacher"][0]
    context.scorers = {**context.scorers, "mixed": (teacher, Component(*_inputs()[:2], 0.5))}
    with _ShapeRecorder() as recorder:
        with active(head, context):
            numbers = head(hidden_NH[None])[0]
        (numbers * upstream_NM).sum().backward()
    assert (limit, V) in recorder.shapes or (chunk, V) in recorder.shapes  # it did look
    for shape in recorder.shapes - {(V, H), (H, V)}:
        assert torch.Size(shape).numel() // V <= limit, f"a tensor of shape {shape} was made"


def test_logits_exist_for_one_chunk_at_a_time() -> None:
    _check_no_more_than_a_chunk_of_logits(chunk=8, limit=8)
    with pytest.raises(AssertionError, match="was made"):
        _check_no_more_than_a_chunk_of_logits(chunk=N, limit=8)


# --- gradient checkpointing -------------------------------------------------------------------------


class Tiny(nn.Module):
    """Embedding, one layer, lm_head; called like a transformers model."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(V, H)
        self.layer = nn.Linear(H, H)
        self.lm_head = nn.Linear(H, V, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        return x + torch.tanh(self.layer(x))

    def forward(self, ids: Tensor, logits_to_keep: Tensor) -> Tensor:
        return self.lm_head(self.hidden(ids)[:, logits_to_keep])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_below_the_head(reentrant: bool) -> None:
    """What models do under gradient_checkpointing_enable; the backward comes after the block."""
    value, grad_hidden, grad_weight = _expected()
    hidden_NH, weight_VH, upstream_NM = _inputs()
    head = ScoringHead(weight_VH)
    layer = lambda x: torch.sin(torch.asin(x / 10)) * 10  # the identity, with something to recompute  # noqa: E731
    with active(head, _context()):
        numbers = head(checkpoint(layer, hidden_NH, use_reentrant=reentrant)[None])[0]
    (numbers * upstream_NM).sum().backward()
    torch.testing.assert_close(numbers.detach(), value)
    torch.testing.assert_close(hidden_NH.grad, grad_hidden)
    torch.testing.assert_close(weight_VH.grad, grad_weight)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_around_the_head_with_the_block_inside(reentrant: bool) -> None:
    _, grad_hidden, grad_weight = _expected()
    hidden_NH, weight_VH, upstream_NM = _inputs()
    head = ScoringHead(weight_VH)

    def scored(hidden: Tensor) -> Tensor:
        with active(head, _context()):
            return head(hidden[None])[0]

    (checkpoint(scored, hidden_NH, use_reentrant=reentrant) * upstream_NM).sum().backward()
    torch.testing.assert_close(hidden_NH.grad, grad_hidden)
    torch.testing.assert_close(weight_VH.grad, grad_weight)


def test_checkpoint_around_the_head_without_its_context_is_an_error_not_a_wrong_gradient() -> None:
    hidden_NH, weight_VH, upstream_NM = _inputs()
    head = ScoringHead(weight_VH)
    with active(head, _context()):
        numbers = checkpoint(lambda hidden: head(hidden[None])[0], hidden_NH, use_reentrant=False)
    with pytest.raises(CheckpointError):
        (numbers * upstream_NM).sum().backward()


# --- bad input --------------------------------------------------------------------------------------


def test_names_that_differ_from_the_declared_ones_are_named() -> None:
    hidden_NH, weight_VH, _ = _inputs()
    head = ScoringHead(weight_VH)
    context = _context()
    context.names = ("divergence", "log_prob", "weighted", "entropie")
    with (
        pytest.raises(ValueError, match=r"missing \['entropie'\], unknown \['entropy'\]"),
        active(head, context),
    ):
        head(hidden_NH[None])


def test_output_that_is_not_one_number_per_token_is_named() -> None:
    hidden_NH, weight_VH, _ = _inputs()
    head = ScoringHead(weight_VH)
    context = ScoringContext(lambda chunk: {"x": chunk.student_logits_CV}, ("x",), _context().tokens_N, 8)
    with pytest.raises(ValueError, match=r"'x' of shape \(8, 101\)"), active(head, context):
        head(hidden_NH[None])


def test_lengths_that_do_not_fit_are_refused() -> None:
    hidden_NH, weight_VH, _ = _inputs()
    head = ScoringHead(weight_VH)
    with pytest.raises(ValueError, match=f"{N - 1} hidden states for {N} tokens"), active(head, _context()):
        head(hidden_NH[None, 1:])
    with pytest.raises(ValueError, match="batch size must be 1"), active(head, _context()):
        head(hidden_NH[None].expand(2, -1, -1))
    context = _context()
    tokens_N = context.tokens_N
    with pytest.raises(ValueError, match=r"extras\['weight'\] has 37 rows but there are 36 tokens"):
        ScoringContext(score, NAMES, tokens_N[1:], 8, extras=context.extras)
    with pytest.raises(ValueError, match=r"scorers\['teacher'\]\[0\] has 37 rows"):
        ScoringContext(score, NAMES, tokens_N[1:], 8, scorers=context.scorers)
    with pytest.raises(ValueError, match="no component"):
        ScoringContext(score, NAMES, tokens_N, 8, scorers={"teacher": ()})
    with pytest.raises(ValueError, match="chunk=0"):
        ScoringContext(score, NAMES, tokens_N, 0)


def test_a_model_without_a_plain_head_is_refused() -> None:
    model = nn.Module()
    with pytest.raises(ValueError, match="no bias-free linear lm_head"):
        install_head(model)
    model.lm_head = nn.Linear(2, 3)
    with pytest.raises(ValueError, match="no bias-free linear lm_head"):
        install_head(model)


# --- Qwen3.5 ----------------------------------------------------------------------------------------


def _tiny_qwen(tied: bool) -> nn.Module:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": V,
        "hidden_size": H,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "full_attention_interval": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": H,
        "num_position_embeddings": 16,
    }
    special = {
        "image_token_id": 90,
        "video_token_id": 91,
        "vision_start_token_id": 92,
        "vision_end_token_id": 93,
    }
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=tied, **special)
    model = Qwen3_5ForConditionalGeneration(config)
    with torch.no_grad():  # far from the flat initial distribution
        model.get_input_embeddings().weight.mul_(40)
        if not tied:
            model.lm_head.weight.mul_(40)
    return model.train()


@pytest.mark.parametrize("tied", [False, True])
def test_qwen_returns_per_token_numbers_as_logits(tied: bool) -> None:
    model = _tiny_qwen(tied)
    ids = torch.randint(0, 90, (1, 24), generator=torch.Generator().manual_seed(4))
    positions = torch.arange(9, 23)  # response tokens 10..23 are predicted one position earlier
    context = _context(len(positions), chunk=5, dtype=torch.float32)
    context.tokens_N = ids[0, 10:]

    hidden = model.model(input_ids=ids).last_hidden_state[0, positions]
    expected = _unchunked(hidden, model.lm_head.weight, context)
    parameters = list(model.parameters())
    grads = torch.autograd.grad(expected[:, :3].sum(), parameters, allow_unused=True)

    before = model(input_ids=ids).logits
    names = list(model.state_dict())
    head = install_head(model)
    model.tie_weights()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert list(model.state_dict()) == names
    assert torch.equal(model(input_ids=ids).logits, before)

    def run(shift: int) -> Tensor:
        with active(head, context):
            return model(input_ids=ids, logits_to_keep=positions + shift).logits

    numbers = run(0)
    assert numbers.shape == (1, len(positions), len(NAMES))
    torch.testing.assert_close(numbers[0], expected, rtol=1e-4, atol=1e-5)
    numbers[..., :3].sum().backward()
    for (name, parameter), grad in zip(model.named_parameters(), grads, strict=True):
        assert (grad is None) == (parameter.grad is None), name
        if grad is not None:
            assert (parameter.grad - grad).norm() <= 1e-4 * grad.norm() + 1e-6, name
    divergence_loss, log_prob_loss = numbers[0, :, :2].detach().mean(0).tolist()
    for shift in (-1, 1):
        shifted = run(shift)[0, :, :2].detach().mean(0).tolist()
        assert shifted[0] != pytest.approx(divergence_loss, rel=1e-3)
        assert shifted[1] != pytest.approx(log_prob_loss, rel=1e-3)


def test_qwen_scorer_hidden_states_reproduce_its_logits() -> None:
    """Gather, then score with itself as the teacher: a divergence of exactly nothing."""
    model = _tiny_qwen(tied=False)
    head = install_head(model)
    ids = torch.randint(0, 90, (1, 24), generator=torch.Generator().manual_seed(4))
    positions = torch.arange(9, 23)
    with torch.no_grad(), active(head, GatherContext()):
        hidden_NH = model(input_ids=ids, logits_to_keep=positions).logits[0]
    context = _context(len(positions), chunk=5, dtype=torch.float32)
    context.scorers = {"teacher": (Component(hidden_NH, head.weight.detach()),)}
    with active(head, context):
        numbers = model(input_ids=ids, logits_to_keep=positions).logits
    numbers[0, :, 0].sum().backward()
    assert numbers[0, :, 0].abs().max() == 0
    assert head.weight.grad.abs().max() < 1e-5


# --- FSDP2 ------------------------------------------------------------------------------------------

# Rows (first, last) of the N positions for each rank: uneven, and a rank without any.
SPLITS = {1: [[(0, N)]], 2: [[(0, 20), (20, N)], [(0, N), (N, N)]]}


def _part(context: ScoringContext, first: int, last: int) -> ScoringContext:
    (teacher,) = context.scorers["teacher"]
    return ScoringContext(
        score,
        NAMES,
        context.tokens_N[first:last],
        context.chunk,
        {"teacher": (Component(teacher.hidden_NH[first:last], teacher.weight_VH),)},
        {"weight": context.extras["weight"][first:last]},
    )


def _ids() -> Tensor:
    return torch.randint(0, V, (1, N), generator=torch.Generator().manual_seed(2))


def _rank(rank: int, ranks: int, directory: Path) -> None:
    """Sharded as verl does: an untied head by itself, a tied one with the root. Rank 0 saves all gradients."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=ranks)
    mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
    results = {}
    for tied in (False, True):
        for split, parts in enumerate(SPLITS[ranks]):
            model = Tiny(tied)
            head = install_head(model)
            wrapped = [model.layer] if tied else [model.layer, model.embed_tokens, model.lm_head]
            for module in (*wrapped, model):
                fully_shard(module, mesh=mesh)
            first, last = parts[rank]
            with active(head, _part(_context(dtype=torch.float32), first, last)):
                numbers_NM = model(_ids(), torch.arange(first, last))[0]
            # FSDP2 averages over ranks; the loss is the sum over all ranks.
            (numbers_NM * _inputs(dtype=torch.float32)[2][first:last]).sum().mul(ranks).backward()
            for name, parameter in model.named_parameters():
                results[tied, split, name] = parameter.grad.full_tensor()
    if rank == 0:
        torch.save(results, directory / "gradients.pt")
    dist.barrier()  # a rank that is left alone while it tears down may abort
    dist.destroy_process_group()
    os._exit(
        0
    )  # all is saved; gloo's threads, still alive while the interpreter ends, abort a rank now and then


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_fsdp2_gradients_equal_single_process_autograd(ranks: int, tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(ranks), str(tmp_path)], env=environment)
        for rank in range(ranks)
    ]
    assert [process.wait(timeout=240) for process in processes] == [0] * ranks
    results = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for tied in (False, True):
        model = Tiny(tied)
        numbers_NM = _unchunked(model.hidden(_ids())[0], model.lm_head.weight, _context(dtype=torch.float32))
        (numbers_NM * _inputs(dtype=torch.float32)[2]).sum().backward()
        for split in range(len(SPLITS[ranks])):
            for name, parameter in model.named_parameters():
                difference = (results[tied, split, name] - parameter.grad).norm()
                assert difference <= 1e-5 * parameter.grad.norm(), (tied, split, name)


if __name__ == "__main__":
    _rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
