"""What the distillation head costs, against the four matrix products that it cannot do without.

    python -m benchmarks.head [--shapes 512,512,151936 ...] [--chunks 512 128] [--rounds 2] [--threads 1] [--device cpu]

Per shape N,H,V (tokens, hidden size, vocabulary): forward and backward of each way to a Jensen-Shannon divergence, from
hidden states and weights of student and teacher to the gradients of the student's. The ways take turns in one process,
the least of the rounds counts, and the table gives it as a multiple of the floor: student and teacher projection,
hidden gradient, weight gradient. Peak memory beyond inputs and gradients is measured for each way in a process
of its own, in MiB and in copies of N x V float32.

Ours is the head itself with Vision-OPD's score. "Full logits" is the published formula in plain torch. TRL's and
Liger's losses are taken from their packages, and left out with a sentence where those are not installed.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vopd import divergence
from vopd.backbone.delta_rule import wide
from vopd.backbone.head import ScoringHead, active
from vopd.backbone.scoring import Component, ScoringContext
from vopd.method import Method, ScoreChunk
from vopd.vision_opd import Settings, build

SHAPES = ((512, 512, 151_936), (256, 512, 248_320), (128, 2560, 151_936))
TOP_K, BETA = 100, 0.5
MIB = 2**20


@dataclass(frozen=True)
class Inputs:
    """Hidden states and head weights of student (with gradient) and teacher, and the sampled tokens."""

    hidden_NH: Tensor
    weight_VH: nn.Parameter
    teacher_NH: Tensor
    teacher_VH: Tensor
    tokens_N: Tensor


def inputs(tokens: int, hidden: int, vocabulary: int, device: str) -> Inputs:
    """Random ones; bfloat16 on a GPU, float32 on a CPU. Logits have a spread of about 3."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden_NH, weight_VH = random(tokens, hidden), random(vocabulary, hidden) * (3 / math.sqrt(hidden))
    teacher_NH = hidden_NH + 0.3 * random(tokens, hidden)
    tokens_N = torch.randint(0, vocabulary, (tokens,), generator=generator, device=device)
    weight = nn.Parameter(weight_VH.to(dtype))
    return Inputs(
        hidden_NH.to(dtype).requires_grad_(), weight, teacher_NH.to(dtype), weight_VH.to(dtype), tokens_N
    )


Way = Callable[[Inputs], object]


def floor(given: Inputs) -> object:
    """The four products, their results in the dtype of the operands."""
    with torch.no_grad():
        logits_NV = given.hidden_NH @ given.weight_VH.t()
        given.teacher_NH @ given.teacher_VH.t()
        return logits_NV @ given.weight_VH, logits_NV.t() @ given.hidden_NH


def ours(top_k: int | None, chunk: int) -> Way:
    """The head with Vision-OPD's score, or with the divergence over the whole vocabulary."""
    method: Method = build(Settings(top_k=top_k or TOP_K, beta=BETA))

    def whole(chunk: ScoreChunk) -> dict[str, Tensor]:
        from vopd.divergence import top_k_tail_divergence

        found = top_k_tail_divergence(chunk.student_logits_CV, chunk.scorer_logits["teacher"], None, BETA)
        return {"divergence": found.divergence_T, "entropy": found.entropy_T}

    names = ("divergence", "entropy") if top_k is None else (*method.outputs, "log_prob")

    def way(given: Inputs) -> object:
        head = ScoringHead(given.weight_VH)
        teacher = (Component(given.teacher_NH, given.teacher_VH),)
        context = ScoringContext(
            whole if top_k is None else method.score, names, given.tokens_N, chunk, {"teacher": teacher}
        )
        with active(head, context):
            numbers_NM = head(given.hidden_NH[None])[0]
        return torch.autograd.grad(numbers_NM[:, 0].mean(), (given.hidden_NH, given.weight_VH))

    return way


def full_logits(given: Inputs) -> object:
    """The published formula: all logits at once, student's top k, the tail as log(1 - sum), autograd."""
    student_NV = wide(given.hidden_NH @ given.weight_VH.t())
    with torch.no_grad():
        teacher_NV = wide(given.teacher_NH @ given.teacher_VH.t()).log_softmax(-1)
    student_NV = student_NV.log_softmax(-1)
    support_NK = student_NV.detach().topk(TOP_K, dim=-1).indices
    buckets = []
    for log_probs_NV in (student_NV, teacher_NV):
        chosen_NK = log_probs_NV.gather(-1, support_NK)
        tail_N1 = (-torch.expm1(chosen_NK.logsumexp(-1, keepdim=True))).clamp(min=1e-12).log()
        buckets.append(torch.cat([chosen_NK, tail_N1], -1))
    student_NB, teacher_NB = buckets
    mixture_NB = torch.logaddexp(student_NB + math.log(1 - BETA), teacher_NB + math.log(BETA))
    terms_NB = BETA * teacher_NB.exp() * (teacher_NB - mixture_NB)
    terms_NB = terms_NB + (1 - BETA) * student_NB.exp() * (student_NB - mixture_NB)
    return torch.autograd.grad(terms_NB.sum(-1).mean(), (given.hidden_NH, given.weight_VH))


def trl() -> Way | str:
    """TRL's generalised JSD over the whole vocabulary, on full logits."""
    try:
        from trl.experimental.gkd.gkd_trainer import GKDTrainer
    except ImportError as error:
        return f"TRL is left out: {error}."

    def way(given: Inputs) -> object:
        student_NV = given.hidden_NH @ given.weight_VH.t()
        with torch.no_grad():
            teacher_NV = given.teacher_NH @ given.teacher_VH.t()
        loss = GKDTrainer.generalized_jsd_loss(student_NV.float()[None], teacher_NV.float()[None], beta=BETA)
        return torch.autograd.grad(loss, (given.hidden_NH, given.weight_VH))

    return way


def liger(chunk: int) -> Way | str:
    """Liger's fused linear JSD over the whole vocabulary, chunked, not compiled."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError as error:
        return f"Liger is left out: {error}."

    def way(given: Inputs) -> object:
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA, compiled=False, chunk_size=chunk
        )
        student, teacher = (given.hidden_NH, given.weight_VH), (given.teacher_NH, given.teacher_VH)
        return torch.autograd.grad(loss(*student, *teacher, given.tokens_N), student)

    return way


def ways(chunks: list[int]) -> tuple[dict[str, Way], list[str]]:
    """What is compared, by name, and a sentence for each that is left out."""
    found: dict[str, Way] = {"floor": floor}
    found |= {f"ours, top {TOP_K}, chunk {chunk}": ours(TOP_K, chunk) for chunk in chunks}
    found[f"full logits, top {TOP_K}"] = full_logits
    found[f"ours, whole vocabulary, chunk {chunks[0]}"] = ours(None, chunks[0])
    others = {"TRL, whole vocabulary": trl(), f"Liger, whole vocabulary, chunk {chunks[0]}": liger(chunks[0])}
    found |= {name: way for name, way in others.items() if not isinstance(way, str)}
    return found, [way for way in others.values() if isinstance(way, str)]


def seconds(way: Way, given: Inputs) -> float:
    """One forward and backward."""
    if given.hidden_NH.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    way(given)
    if given.hidden_NH.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(way: Way, given: Inputs) -> int:
    """Most memory beyond what was there before and the two gradients; in a process that did nothing else."""
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in (given.hidden_NH, given.weight_VH))
    if given.hidden_NH.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way(given)
        return torch.cuda.max_memory_allocated() - before - gradients
    way(inputs(2, 8, 1024, "cpu"))  # libraries are loaded, threads are there
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _peak_rss()
    way(given)
    return _peak_rss() - before - gradients


def _peak_rss() -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def memory(name: str, shape: tuple[int, ...], args: argparse.Namespace) -> float:
    """Peak MiB of one way, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.head", "--memory-of", name, "--device", args.device]
    command += ["--shapes", ",".join(map(str, shape)), "--chunks", *map(str, args.chunks)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=[",".join(map(str, shape)) for shape in SHAPES])
    parser.add_argument("--chunks", nargs="+", type=int, default=[512, 128])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    compared, left_out = ways(args.chunks)
    shapes = [tuple(int(number) for number in shape.split(",")) for shape in args.shapes]
    if args.memory_of:
        print(json.dumps(peak_bytes(compared[args.memory_of], inputs(*shapes[0], args.device))))
        return
    machine = f"{args.threads} thread(s) of a CPU"
    if args.device == "cuda":
        kernels = divergence._kernels(torch.zeros(1, 1, device="cuda"))
        machine = (
            f"{torch.cuda.get_device_name()}, top-k divergence in {'Triton' if kernels else 'plain torch'}"
        )
    print(f"torch {torch.__version__}, {machine}; least of {args.rounds} rounds, in turns")
    print("\n".join(left_out))
    for shape in shapes:
        show(shape, compared, args)


def show(shape: tuple[int, ...], compared: dict[str, Way], args: argparse.Namespace) -> None:
    """Measure one shape and print its table."""
    given = inputs(*shape, args.device)
    least = dict.fromkeys(compared, math.inf)
    for _ in range(args.rounds):
        for name, way in compared.items():
            least[name] = min(least[name], seconds(way, given))
    copy = shape[0] * shape[2] * 4 / MIB
    print(
        "\n| N {} H {} V {} | seconds | x floor | MiB | copies of N x V |\n|---|---|---|---|---|".format(
            *shape
        )
    )
    for name in compared:
        peak = memory(name, shape, args)
        print(
            f"| {name} | {least[name]:.3f} | {least[name] / least['floor']:.2f} | {peak:.0f} | {peak / copy:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
