"""The kernels of `vopd/divergence_triton.py` against float64 in plain torch: one row a case, its error and its limit.

    python -m benchmarks.gpu_kernels [--device cuda]

On a GPU the kernels are compiled and see 256 tokens of a vocabulary of 151,936, one of odd size, and offsets past
2^31; on a CPU Triton's interpreter runs them on small shapes. Needs torch and Triton alone. Exits with 1 if an error is
above its limit. A value's error is the largest one as a share of the largest value, a gradient's that of the row where
it is worst, as a share of the row's largest entry. Where float32 itself is coarse (logits of 1e4, a gradient near 0)
the limit is four times the error of plain torch in float32.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from vopd import divergence

SEED = 0
LIMIT, TIMES_PLAIN = 3e-6, 4.0
INTERPRETED = ((2, 9001, 7), (2, 2500, 100))  # tokens, vocabulary, k; several blocks, and a k without groups
COMPILED = ((256, 151_936, 100), (37, 151_937, 100), (64, 248_320, 1000))


class Row(NamedTuple):
    """What was compared, how far off it was, and how far it may be."""

    name: str
    error: float
    limit: float


def check(device: str) -> list[Row]:
    """Every case on this device. On "cpu" the environment must hold TRITON_INTERPRET=1 before Triton is imported.

    Raises:
        RuntimeError: the kernels cannot be had, so that plain torch would be compared with itself.
    """
    if divergence._kernels(torch.zeros(1, 1, device=device)) is None:
        raise RuntimeError(
            f"no kernels on {device}: Triton cannot be imported, or TRITON_INTERPRET=1 is not set on a CPU."
        )
    rows = []
    for tokens, vocabulary, k in COMPILED if device == "cuda" else INTERPRETED:
        for kind, (student_TV, teacher_TV) in _logits(tokens, vocabulary, device).items():
            case = f"({tokens}, {vocabulary}) k {k} {kind}"
            rows += [
                Row(f"{case}: {name}", error, limit)
                for name, error, limit in _errors(student_TV, teacher_TV, k)
            ]
    if device == "cuda":
        rows.append(_far_offsets())
    return rows


def _logits(tokens: int, vocabulary: int, device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Student and teacher by kind."""
    generator = torch.Generator(device).manual_seed(SEED)

    def random() -> Tensor:
        return torch.randn(tokens, vocabulary, generator=generator, device=device)

    student_TV, noise_TV = 3 * random(), random()
    masked_TV = student_TV.masked_fill(random() > 1, float("-inf"))
    masked_TV[:, vocabulary // 2 :] = float("-inf")
    return {
        "apart": (student_TV, student_TV + noise_TV),
        "near": (student_TV, student_TV + 0.01 * noise_TV),
        "tied": (student_TV.round(), (student_TV + noise_TV).round()),
        "masked": (masked_TV, (masked_TV + noise_TV)),
        "extreme": (student_TV.sign() * 1e4 + noise_TV, noise_TV.sign() * 1e4 + student_TV),
    }


def _errors(student_TV: Tensor, teacher_TV: Tensor, k: int) -> Iterator[tuple[str, float, float]]:
    """Name, error and limit of each number."""
    exact = _numbers(student_TV.double(), teacher_TV.double(), k)
    found = _numbers(student_TV, teacher_TV, k)
    with patch.object(divergence, "_kernels", lambda *_: None):
        plain = _numbers(student_TV, teacher_TV, k)
    yield "ids of the top k that differ", float((found.pop("ids") != exact.pop("ids")).sum()), 0.0
    for name, number in found.items():
        yield name, _error(number, exact[name]), max(LIMIT, TIMES_PLAIN * _error(plain[name], exact[name]))


def _numbers(student_TV: Tensor, teacher_TV: Tensor, k: int) -> dict[str, Tensor]:
    """Everything that the kernels have a part in, by name: values (T,), gradients (T, V), ids (T, K)."""
    found = {"ids": divergence.student_top_k(student_TV, k).sort(-1).values}
    for beta in (0.0, 0.5, 1.0):
        leaf_TV = student_TV.clone().requires_grad_()
        numbers = divergence.top_k_tail_divergence(leaf_TV, teacher_TV, k, beta)
        found[f"divergence, beta {beta}"] = numbers.divergence_T
        (found[f"its gradient, beta {beta}"],) = torch.autograd.grad(numbers.divergence_T.sum(), leaf_TV)
    found |= {name: getattr(numbers, name) for name in numbers._fields[1:]}
    leaf_TV = student_TV.clone().requires_grad_()
    log_prob_T = divergence.sampled_token_log_prob(leaf_TV, teacher_TV.argmax(-1))
    found["log-prob of a token"] = log_prob_T
    (found["gradient of the log-prob"],) = torch.autograd.grad(log_prob_T.sum(), leaf_TV)
    found["entropy alone"] = divergence.entropy(student_TV)
    return {name: number.detach() for name, number in found.items()}


def _error(found: Tensor, exact: Tensor) -> float:
    """Of values as a share of the largest one, of gradients as a share of the largest entry of their row."""
    largest = exact.abs().amax(-1, keepdim=True).clamp(min=1e-3)
    return float(((found.double() - exact).abs() / largest).nan_to_num(nan=float("inf")).max())


def _far_offsets() -> Row:
    """The last rows of more than 2^31 logits, against those rows alone: the order of sums may differ. Takes 30 GB."""
    vocabulary, last, k = 151_936, 8, 100
    tokens = 2**31 // vocabulary + last
    generator = torch.Generator("cuda").manual_seed(SEED)
    student_TV = torch.zeros(tokens, vocabulary, device="cuda")
    student_TV[-last:] = 3 * torch.randn(last, vocabulary, generator=generator, device="cuda")
    teacher_TV = torch.zeros_like(student_TV)
    teacher_TV[-last:] = student_TV[-last:] + torch.randn(
        last, vocabulary, generator=generator, device="cuda"
    )

    alone = student_TV[-last:].clone(), teacher_TV[-last:].clone()
    results = []
    for student, teacher in ((student_TV, teacher_TV), alone):
        leaf_TV = student.requires_grad_()
        numbers = divergence.top_k_tail_divergence(leaf_TV, teacher, k, 0.5)
        (grad_TV,) = torch.autograd.grad(numbers.divergence_T.sum(), leaf_TV)
        results.append([number[-last:].detach() for number in (*numbers, grad_TV)])
    difference = max(float((x - y).abs().max()) for x, y in zip(*results, strict=True))
    return Row(f"({tokens}, {vocabulary}): the last rows, 2^31 logits in", difference, 1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first asked for
    rows = check(device)
    machine = torch.cuda.get_device_name() if device == "cuda" else "Triton's interpreter"
    print(f"torch {torch.__version__}, {machine}\n\n| case | error | limit |\n|---|---|---|")
    for row in rows:
        print(
            f"| {row.name} | {row.error:.1e} | {row.limit:.0e} |{'' if row.error <= row.limit else ' ABOVE'}"
        )
    above = sum(not row.error <= row.limit for row in rows)
    print(f"\n{len(rows)} rows, {above} above their limit")
    sys.exit(1 if above else 0)


if __name__ == "__main__":
    main()
