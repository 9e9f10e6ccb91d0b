"""The Triton kernels against plain torch in float64, by Triton's interpreter on a CPU and compiled on a GPU.

Triton reads TRITON_INTERPRET when it is imported, which another test of this process may have done already. So
`test_under_the_interpreter` runs the class `TestInterpreted` in a process of its own.
"""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vopd
from vopd import divergence
from vopd.divergence import (
    TopKTailDivergence,
    entropy,
    sampled_token_log_prob,
    student_top_k,
    top_k_tail_divergence,
)

ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INF = float("inf")
KERNELS = {
    "_group_keys": {
        "logits_TV": "*fp32",
        "keys_TG": "*i64",
        "vocabulary": "i32",
        "groups": "i32",
        "GROUPS": 128,
        "GROUP": 32,
    },
    "_candidate_keys": {
        "logits_TV": "*fp32",
        "chosen_TK": "*i64",
        "keys_TV": "*i64",
        "vocabulary": "i32",
        "k": "i32",
        "GROUPS": 128,
        "GROUP": 32,
    },
    "_tail_sums": {
        "student_TV": "*fp32",
        "teacher_TV": "*fp32",
        "threshold_T1": "*fp32",
        "last_T1": "*i64",
        "sums": "*fp32",
        "rows": "i32",
        "vocabulary": "i32",
        "BLOCK": 2048,
    },
    "_whole_sums": {"logits_TV": "*fp32", "sums": "*fp32", "rows": "i32", "vocabulary": "i32", "BLOCK": 2048},
    "_scaled_exp": {
        "logits_TV": "*fp32",
        "shift_T1": "*fp32",
        "factor_T1": "*fp32",
        "result_TV": "*fp32",
        "vocabulary": "i32",
        "BLOCK": 2048,
    },
}


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this process is the one")
def test_under_the_interpreter() -> None:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "TestInterpreted"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, __file__], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d passed", done.stdout) and "skipped" not in done.stdout


def _draw_logits(data: st.DataObject) -> tuple[Tensor, Tensor]:
    tokens = data.draw(st.integers(1, 3))
    vocabulary = data.draw(st.sampled_from((1, 2, 31, 33, 2047, 2048, 2049, 9001)) | st.integers(1, 4200))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31 - 1)))
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "random": lambda x: 3 * x,
        "tied": lambda x: x.round(),
        "zero": torch.zeros_like,
        "extreme": lambda x: 1e4 * x.sign(),
        "masked": lambda x: x.masked_fill(x > 0.5, -INF),
        "one left": lambda x: x.masked_fill(x < x.amax(-1, keepdim=True), -INF),
    }
    student_TV, teacher_TV = (
        kinds[data.draw(st.sampled_from(sorted(kinds)))](torch.randn(tokens, vocabulary, generator=generator))
        for _ in range(2)
    )
    return student_TV, teacher_TV


def _draw_k(data: st.DataObject, vocabulary: int) -> int:
    few = max(1, (vocabulary - 1) // 128)  # so few that top_k looks at groups
    return data.draw(st.sampled_from((1, few, vocabulary)) | st.integers(1, few) | st.integers(1, vocabulary))


def _check(numbers: Callable[..., tuple[Tensor, ...]], *logits: Tensor) -> None:
    """The kernels' results are those of float64 to 3e-6 of the largest in a row, or as near as plain torch's."""
    exact = numbers(*(x.double() for x in logits))
    with patch.object(divergence, "_kernels", lambda *_: None):
        plain = numbers(*logits)
    for found, plain_one, exact_one in zip(numbers(*logits), plain, exact, strict=True):
        assert found.dtype == torch.float32
        finite = exact_one.isfinite()
        torch.testing.assert_close(found[~finite].double(), exact_one[~finite], equal_nan=True)
        assert _error(found, exact_one) <= max(3e-6, 4 * _error(plain_one, exact_one))


def _error(found: Tensor, exact: Tensor) -> float:
    finite = exact.isfinite()
    largest = exact.where(finite, 0.0).abs().amax(-1, keepdim=True).clamp(min=0.1)
    return float(((found.double() - exact) / largest).where(finite, 0.0).abs().max())


def _with_gradient(
    function: Callable[..., Tensor | TopKTailDivergence], weight_T: Tensor | None = None
) -> Callable:
    """The function's numbers and the gradient of the first one, weighted."""

    def numbers(student_TV: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        leaf_TV = student_TV.clone().requires_grad_()
        found = function(leaf_TV, *others)
        found = found if isinstance(found, tuple) else (found,)
        weights_T = torch.ones_like(found[0]) if weight_T is None else weight_T.to(found[0])
        (grad_TV,) = torch.autograd.grad((found[0] * weights_T).sum(), leaf_TV)
        return (*(x.detach() for x in found), grad_TV)

    return numbers


@pytest.mark.skipif(not INTERPRETED, reason="run by test_under_the_interpreter")
class TestInterpreted:
    @settings(deadline=None, max_examples=40)
    @given(st.data())
    def test_sums(self, data: st.DataObject) -> None:
        """The kernels' own results, entry by entry."""
        kernels = divergence._imported_kernels()
        assert kernels is not None
        student_TV, teacher_TV = _draw_logits(data)
        support_TK = divergence._support(student_TV, _draw_k(data, student_TV.shape[1]))[0]
        for logits_TV, sums in zip(
            (student_TV, teacher_TV), kernels.tails(student_TV, teacher_TV, support_TK), strict=True
        ):
            tail_TV = logits_TV.double().scatter(-1, support_TK, -INF)
            _check_sums(sums, tail_TV)
        _check_sums(kernels.whole(student_TV), student_TV.double())
        shift_T1, factor_T1 = teacher_TV.amax(-1, keepdim=True).clamp(min=0.0), teacher_TV[:, :1].sign()
        exact_TV = factor_T1 * (student_TV.double() - shift_T1).clamp(max=88).exp()
        found_TV = kernels.scaled_exp(student_TV.clamp(max=88 + shift_T1), shift_T1, factor_T1)
        torch.testing.assert_close(found_TV.double(), exact_TV, rtol=2e-5, atol=1e-30)

    @settings(deadline=None, max_examples=80)
    @given(st.data())
    def test_top_k_is_the_stable_sort(self, data: st.DataObject) -> None:
        logits_TV = _draw_logits(data)[0]
        logits_TV = logits_TV.where(logits_TV != 0, -0.0) if data.draw(st.booleans()) else logits_TV
        logits_TV[:, ::2] = logits_TV[:, ::2].where(logits_TV[:, ::2] != 0, 0.0)
        k = _draw_k(data, logits_TV.shape[1])
        expected_TK = np.argsort(-logits_TV.numpy(), axis=-1, kind="stable")[:, :k]
        found_TK = student_top_k(logits_TV, k)
        assert found_TK.dtype == torch.int64
        np.testing.assert_array_equal(found_TK.sort(-1).values.numpy(), np.sort(expected_TK, axis=-1))

    @settings(deadline=None, max_examples=30)
    @given(st.data())
    def test_values_and_gradients(self, data: st.DataObject) -> None:
        student_TV, teacher_TV = _draw_logits(data)
        k = _draw_k(data, student_TV.shape[1])
        beta = data.draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
        _check(_with_gradient(lambda z, t: top_k_tail_divergence(z, t, k, beta)), student_TV, teacher_TV)

    def test_the_incoming_gradient_weights_each_row(self) -> None:
        student_TV, teacher_TV = torch.randn(2, 3, 400, generator=torch.Generator().manual_seed(0))
        weight_T = torch.tensor([2.0, 0.0, -1.0])
        _check(
            _with_gradient(lambda z, t: top_k_tail_divergence(z, t, 3, 0.5), weight_T), student_TV, teacher_TV
        )

    def test_sampled_token_and_entropy(self) -> None:
        logits_TV = 3 * torch.randn(4, 2500, generator=torch.Generator().manual_seed(1))
        logits_TV[3, 100:] = -INF
        token_T, weight_T = torch.tensor([0, 2499, 7, 7]), torch.tensor([1.0, -2.0, 0.0, 0.5])
        _check(_with_gradient(lambda z: sampled_token_log_prob(z, token_T), weight_T), logits_TV)
        _check(lambda z: (entropy(z),), logits_TV)

    def test_a_row_that_is_not_finite_says_so_and_spares_the_others(self) -> None:
        student_TV, teacher_TV = torch.randn(2, 4, 400, generator=torch.Generator().manual_seed(2))
        good = top_k_tail_divergence(student_TV, teacher_TV, 3, 0.5)
        student_TV[1, 17], teacher_TV[2, 399] = float("nan"), float("nan")
        leaf_TV = student_TV.requires_grad_()
        bad = top_k_tail_divergence(leaf_TV, teacher_TV, 3, 0.5)
        bad.divergence_T.sum().backward()
        assert bad.divergence_T.isnan().tolist() == [False, True, True, False]
        assert leaf_TV.grad.isnan().any(-1).tolist() == [False, True, True, False]
        assert torch.equal(bad.divergence_T[::3], good.divergence_T[::3])
        assert sampled_token_log_prob(student_TV, torch.zeros(4, dtype=torch.long)).isnan().tolist()[1]

    def test_strides_and_no_rows(self) -> None:
        wide_VT = torch.randn(400, 6, generator=torch.Generator().manual_seed(3))
        student_TV, teacher_TV = wide_VT.t()[::2], wide_VT[:, :1].t().expand(3, -1)
        found = top_k_tail_divergence(student_TV, teacher_TV, 3, 0.5).divergence_T
        copies = student_TV.contiguous(), teacher_TV.contiguous()
        assert torch.equal(found, top_k_tail_divergence(*copies, 3, 0.5).divergence_T)
        leaf_TV = torch.zeros(0, 400, requires_grad=True)
        top_k_tail_divergence(leaf_TV, torch.zeros(0, 400), 3, 0.5).divergence_T.sum().backward()
        assert leaf_TV.grad.shape == (0, 400)

    @pytest.mark.parametrize("k", [0, 401])
    def test_a_k_that_does_not_fit_is_the_same_error(self, k: int) -> None:
        with pytest.raises(ValueError, match=rf"k={k}.*V=400"):
            top_k_tail_divergence(torch.zeros(2, 400), torch.zeros(2, 400), k, 0.5)

    def test_inside_the_head(self) -> None:
        """Its logits lie in buffers that the next chunk overwrites."""
        from vopd.backbone.head import ScoringHead, active
        from vopd.backbone.scoring import Component, ScoringContext

        def score(chunk):
            numbers = top_k_tail_divergence(chunk.student_logits_CV, chunk.scorer_logits["teacher"], 3, 0.5)
            return {"divergence": numbers.divergence_T}

        generator = torch.Generator().manual_seed(4)
        inputs = [torch.randn(rows, 8, generator=generator) for rows in (9, 400, 9)]

        def numbers(hidden_NH: Tensor, weight_VH: Tensor, teacher_NH: Tensor) -> tuple[Tensor, ...]:
            hidden_NH, weight_VH = hidden_NH.clone().requires_grad_(), nn.Parameter(weight_VH.clone())
            scorers = {"teacher": (Component(teacher_NH, weight_VH.detach()),)}
            context = ScoringContext(score, ("divergence",), torch.zeros(9, dtype=torch.long), 4, scorers)
            head = ScoringHead(weight_VH)
            with active(head, context):
                numbers_NM = head(hidden_NH[None])[0]
            grads = torch.autograd.grad(numbers_NM.sum(), (hidden_NH, weight_VH))
            return numbers_NM[:, 0].detach(), *grads

        _check(numbers, *inputs)

    def test_every_case_of_the_benchmark(self) -> None:
        _check_benchmark("cpu")


def _check_sums(sums: tuple[Tensor, Tensor, Tensor], exact_TV: Tensor) -> None:
    largest_T1, sum_T1, moment_T1 = (x.double() for x in sums)
    above_TV = exact_TV - exact_TV.amax(-1, keepdim=True).clamp(min=-1e30)
    there_T1 = (exact_TV > -INF).any(-1, keepdim=True)
    assert torch.equal(largest_T1[there_T1], exact_TV.amax(-1, keepdim=True)[there_T1])
    torch.testing.assert_close(sum_T1, above_TV.exp().sum(-1, keepdim=True), rtol=1e-6, atol=0)
    moment_exact_T1 = (above_TV.exp() * above_TV.clamp(min=-1e30)).sum(-1, keepdim=True)
    torch.testing.assert_close(moment_T1, moment_exact_T1, rtol=1e-6, atol=1e-30)


def _check_benchmark(device: str) -> None:
    from benchmarks.gpu_kernels import check

    rows = check(device)
    assert len(rows) > 100 and max(row.limit for row in rows) < 1e-2
    assert [row for row in rows if not row.error <= row.limit] == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_on_a_gpu() -> None:
    """Among other shapes at 256 tokens of a vocabulary of 151,936."""
    _check_benchmark("cuda")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_a_gpu(
    name: str, architecture: int, aligned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code of Ampere, Hopper and Blackwell, without spilled registers; the interpreter checks no types."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vopd import divergence_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    arguments = KERNELS[name]
    constants = {key: value for key, value in arguments.items() if isinstance(value, int)}
    signature = {key: "constexpr" if key in constants else value for key, value in arguments.items()}
    wide = [i for i, (key, kind) in enumerate(signature.items()) if kind[0] == "*" or key == "vocabulary"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in wide} if aligned else {}
    source = ASTSource(getattr(divergence_triton, name), signature, constants, attributes)
    compiled = triton.compile(source, GPUTarget("cuda", architecture, 32), {"num_warps": 8})
    assert compiled.metadata.shared <= 99 * 1024
    assert re.search(r"muli .* : i64", compiled.asm["ttir"])  # offsets of rows
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    assert re.search(r"STACK:0 .*LOCAL:0", usage.stdout)


def test_without_triton_plain_torch_and_one_sentence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as if the logits were on CUDA
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "vopd.divergence_triton", raising=False)
    monkeypatch.delattr(vopd, "divergence_triton", raising=False)
    divergence._imported_kernels.cache_clear()
    student_TV, teacher_TV = torch.randn(2, 3, 400, generator=torch.Generator().manual_seed(5))
    with caplog.at_level(logging.WARNING):
        found = [top_k_tail_divergence(student_TV, teacher_TV, 3, 0.5) for _ in range(2)][1]
    divergence._imported_kernels.cache_clear()
    assert [record.name for record in caplog.records] == ["vopd.divergence"]
    assert "triton" in caplog.text and "plain torch" in caplog.text
    exact = top_k_tail_divergence(student_TV.double(), teacher_TV.double(), 3, 0.5)
    assert _error(found.divergence_T, exact.divergence_T) < 3e-6


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is asked for")
def test_on_a_cpu_triton_is_not_imported() -> None:
    code = (
        "import sys, torch\nfrom vopd.divergence import *\nx = torch.zeros(2, 400, requires_grad=True)\n"
        "top_k_tail_divergence(x, x.detach(), 3, 0.5).divergence_T.sum().backward()\n"
        "sampled_token_log_prob(x, torch.zeros(2, dtype=torch.long))\nprint('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
