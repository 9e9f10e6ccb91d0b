"""What `benchmarks.gpu_check` measures: one function a part, which yields its rows as it finds them.

The first four need torch alone (and Triton). The last two run a recipe through the whole stack, with random weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import gpu_kernels, head
from vopd.backbone.delta_rule import gated_delta_rule, unit, wide
from vopd.backbone.projection import Projection
from vopd.common.paths import ROOT

SEED = 0
FLOAT32, FLOAT32_SUMS, BFLOAT16 = 1e-5, 3e-4, 2e-2
"""Errors as a share of the norm: of float32 throughout; of bfloat16 operands whose products are added up and returned
in float32 (a result rounded to bfloat16 is off by 1.6e-3); of operands and results in bfloat16."""
K3 = {"cpu": 1e-5, "cuda": 1e-3}
"""verl's rollout never samples image tokens, to which random weights give their share: 3e-6 at 1,024 entries."""
PHASES = ("gen", "scorers", "student", "update_actor", "update_weights", "step")
MOST_LOG = 2_000  # characters of a run's log that are shown when it fails


class Row(NamedTuple):
    """A number and, where there is one, the most it may be; without a number `unit` says why there is none."""

    name: str
    value: float | None
    unit: str
    limit: float | None = None

    def holds(self) -> bool:
        """Not so for a number that is not one."""
        return self.limit is None or (self.value is not None and self.value <= self.limit)


# ---- torch alone ----------------------------------------------------------------------------------------------------


def delta_rule(device: str) -> Iterator[Row]:
    """The plain-torch rule, and the fast kernel if it is installed, against a float64 recurrence over tokens."""
    heads, dim, length = (16, 128, 500) if device == "cuda" else (2, 32, 100)
    given = _rule_inputs(length, heads, dim, device)
    exact = _rule_numbers(_recurrence, [x.double() for x in given])
    found = _rule_numbers(lambda *x: gated_delta_rule(*x)[0], given)
    yield from _compared("ours, float32", found, exact, FLOAT32)
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        yield Row("flash-linear-attention", None, f"left out: {error}")
        return

    def fla(*x: Tensor, cuts: Tensor | None = None) -> Tensor:
        q, k, v, g, beta = x
        return chunk_gated_delta_rule(  # type: ignore[no-any-return]
            q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True, cu_seqlens=cuts
        )[0]

    half = [x if i == 3 else x.bfloat16() for i, x in enumerate(given)]  # the layer's decay is float32
    ours = _rule_numbers(lambda *x: gated_delta_rule(*x)[0], [wide(x) for x in half])
    yield from _compared(
        "flash-linear-attention, bfloat16, to ours", _rule_numbers(fla, half), ours, BFLOAT16
    )
    first = length // 3
    cuts = torch.tensor([0, first, length], device=device)
    parts = [[wide(x[:, rows]) for x in half] for rows in (slice(first), slice(first, None))]
    apart = torch.cat([gated_delta_rule(*part)[0] for part in parts], 1)
    packed = fla(*half, cuts=cuts)
    yield Row("flash-linear-attention, two packed sequences", _off(packed, apart), "of norm", BFLOAT16)


def _rule_inputs(length: int, heads: int, dim: int, device: str) -> list[Tensor]:
    """q, k, v (1, T, H, D), log decay and beta (1, T, H), float32."""
    generator = torch.Generator(device).manual_seed(SEED)
    shape = (1, length, heads, dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
    g, beta = (torch.rand(shape[:3], generator=generator, device=device) for _ in range(2))
    return [q, k, v, -0.5 * g, beta]


def _recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The rule token by token, as it is defined."""
    q, k = unit(q) * q.shape[-1] ** -0.5, unit(k)
    state = q.new_zeros(len(q), q.shape[2], q.shape[-1], v.shape[-1])
    out = []
    for q_t, k_t, v_t, g_t, beta_t in zip(*(x.unbind(1) for x in (q, k, v, g, beta)), strict=True):
        state = state * g_t.exp()[..., None, None]
        seen = (k_t[..., None, :] @ state).squeeze(-2)
        state = state + k_t[..., None] * (beta_t[..., None] * (v_t - seen))[..., None, :]
        out.append((q_t[..., None, :] @ state).squeeze(-2))
    return torch.stack(out, 1)


def _rule_numbers(rule: Callable[..., Tensor], given: list[Tensor]) -> dict[str, Tensor]:
    """Output, and the gradients of a weighted sum of it (a plain sum would hide mistakes that add up to nothing)."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out = rule(*leaves)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).reshape(out.shape)
    gradients = torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves)
    return {"output": out.detach(), **dict(zip(("dq", "dk", "dv", "dg", "dbeta"), gradients, strict=True))}


def products(device: str) -> Iterator[Row]:
    """The head's three products with float32 sums and results, on CUDA from bfloat16 operands, against float64."""
    tokens, hidden, vocabulary = (512, 2560, 151_936) if device == "cuda" else (32, 64, 1000)
    given = head.inputs(tokens, hidden, vocabulary, device)
    hidden_NH, weight_VH = given.hidden_NH.detach(), given.weight_VH.detach()
    yield from product_errors(Projection(hidden_NH, weight_VH), hidden_NH, weight_VH)


def product_errors(projection: Projection, hidden_NH: Tensor, weight_VH: Tensor) -> Iterator[Row]:
    """Errors of a projection's three products; gradients come in the operands' dtype, so that only sums can differ."""
    limit = FLOAT32_SUMS if projection.mixed else FLOAT32
    generator = torch.Generator(hidden_NH.device).manual_seed(SEED + 1)
    shape = (len(hidden_NH), len(weight_VH))
    grad_NV = torch.randn(shape, generator=generator, device=hidden_NH.device).to(weight_VH.dtype)
    wide_NV, rows = grad_NV.float(), slice(0, len(hidden_NH))
    logits_NV = torch.empty_like(wide_NV)
    projection.write_logits(rows, logits_NV)
    yield Row("logits", _off(logits_NV, hidden_NH.double() @ weight_VH.double().t()), "of norm", limit)
    grad_NH = torch.empty_like(hidden_NH, dtype=torch.float32)
    projection.write_hidden_gradient(wide_NV, grad_NH)
    exact_NH = grad_NV.double() @ weight_VH.double()
    yield Row("gradient of hidden states", _off(grad_NH, exact_NH), "of norm", limit)
    grad_VH = torch.ones_like(weight_VH, dtype=torch.float32)
    projection.add_weight_gradient(wide_NV, rows, grad_VH)
    exact_VH = grad_NV.double().t() @ hidden_NH.double() + 1
    yield Row("gradient of the weight, added to what is there", _off(grad_VH, exact_VH), "of norm", limit)


def kernels(device: str) -> Iterator[Row]:
    """The Triton kernels against float64: of all the cases the one nearest to its limit."""
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first asked for
    rows = gpu_kernels.check(device)
    worst = max(rows, key=lambda row: _share(row.error, row.limit))
    yield Row(f"nearest to its limit of {len(rows)}: {worst.name}", worst.error, "", worst.limit)
    above = sum(not row.error <= row.limit for row in rows)
    yield Row("cases above their limit", float(above), "", 0.0)


def _share(error: float, limit: float) -> float:
    """Error by limit; what is not a number counts most, an exact case with a limit of 0 least."""
    if error != error:
        return float("inf")
    return error / limit if limit else (float("inf") if error else 0.0)


def head_values(device: str) -> Iterator[Row]:
    """Gradients of the whole head with Vision-OPD's score against the published formula in float64 on full logits."""
    tokens, hidden, vocabulary = (256, 1024, 248_320) if device == "cuda" else (32, 32, 500)
    given = head.inputs(tokens, hidden, vocabulary, device)
    exact = head.full_logits(_double(given))
    found = head.ours(head.TOP_K, chunk=tokens // 3)(given)
    limit = BFLOAT16 if device == "cuda" else FLOAT32
    for name, left, right in zip(("hidden states", "weight"), found, exact, strict=True):
        yield Row(f"gradient of the {name}", _off(left, right), "of norm", limit)


def _double(given: head.Inputs) -> head.Inputs:
    return head.Inputs(
        given.hidden_NH.detach().double().requires_grad_(),
        nn.Parameter(given.weight_VH.detach().double()),
        given.teacher_NH.double(),
        given.teacher_VH.double(),
        given.tokens_N,
    )


def head_time(device: str) -> Iterator[Row]:
    """The head's forward and backward against its four products alone, in turns, least of three rounds."""
    tokens, hidden, vocabulary, chunk = (4096, 1024, 248_320, 256) if device == "cuda" else (64, 64, 2000, 16)
    given = head.inputs(tokens, hidden, vocabulary, device)
    ways = {"floor": head.floor, "ours": head.ours(head.TOP_K, chunk)}
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(3):
        for name, way in ways.items():
            least[name] = min(least[name], head.seconds(way, given))
    shape = f"N {tokens}, H {hidden}, V {vocabulary}, chunk {chunk}"
    yield Row(f"the four products, {shape}", least["floor"], "s")
    yield Row("the head", least["ours"], "s")
    yield Row("the head over its products", least["ours"] / least["floor"], "times")


def _compared(name: str, found: dict[str, Tensor], exact: dict[str, Tensor], limit: float) -> Iterator[Row]:
    for key, number in found.items():
        yield Row(f"{name}: {key}", _off(number, exact[key]), "of norm", limit)


def _off(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference as a share of the exact one's."""
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


# ---- the whole stack ------------------------------------------------------------------------------------------------


def vision_opd(device: str) -> Iterator[Row]:
    """Two updates of Vision-OPD: teachers, divergence, moving average."""
    yield from _updates("vision_opd", device)


def grpo(device: str) -> Iterator[Row]:
    """Two updates of GRPO: rewards and advantages."""
    yield from _updates("grpo", device)


def _updates(recipe: str, device: str) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as name:
        folder = Path(name)
        make_model(folder / "model", device)
        make_triplets(folder / "triplets")
        command = [sys.executable, "-P", "-m", "vopd", "run", recipe, *run_settings(folder, device)]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "VOPD_CACHE": str(folder / "cache")}, check=False
        )
        if done.returncode:
            log = folder / "run" / "log.txt"
            tail = log.read_text(errors="replace")[-MOST_LOG:] if log.exists() else "no log"
            raise RuntimeError(f"vopd run {recipe} ended with exit code {done.returncode}: {tail}")
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        yield from run_rows([json.loads(line) for line in lines], device)


def run_rows(lines: list[dict[str, float]], device: str) -> Iterator[Row]:
    """What metrics.jsonl says of a run: all updates were applied, the policies agree, the last update's seconds."""
    last = lines[-1]
    yield Row("updates that are missing", float(2 - len(lines)), "", 0.0)
    yield Row("updates skipped", float(sum(line["skipped_updates"] for line in lines)), "", 0.0)
    yield Row(
        "k3 of rollout and trainer",
        max(abs(line["rollout/k3"]) for line in lines),
        "nats a token",
        K3[device],
    )
    yield Row("gradient norm", last["grad_norm"], "")
    for phase in PHASES:
        if f"seconds/{phase}" in last:
            yield Row(f"second update: {phase}", last[f"seconds/{phase}"], "s")
    if device == "cuda":
        yield Row("GPU memory of the trainer, peak", last["perf/max_memory_allocated_gb"], "GB")
    yield Row("host memory in use", last["perf/cpu_memory_used_gb"], "GB")


def run_settings(folder: Path, device: str) -> list[str]:
    """Settings of a run of two updates in this folder: on CUDA as a profile for GPUs has them."""
    settings = [
        f"run_dir={folder / 'run'}", f"model.path={folder / 'model'}", f"data.folder={folder / 'triplets'}",
        "data.prepare=null", "train.steps=2", "train.prompts=8", "train.rollouts=4", "train.save_every=0",
        "train.save_minutes=1000", "evaluate.test_rows=2", "evaluate.holdout_rows=2",
        "evaluate.validation_rows=2", "evaluate.every=0", "export=''", "hardware.memory_gib=0.01",
        "hardware.disk_gib=0.01",
    ]  # fmt: skip
    if device == "cuda":
        settings += ["hardware.device=cuda", "train.packed=true", "train.gradient_checkpointing=true"]
    return settings


def make_triplets(folder: Path) -> None:
    """A few generated rows a split, validated."""
    from data import schema, validate
    from data.miniature import prepare

    folder.mkdir(parents=True)
    for split, count in {"train": 16, "validation": 4, "test": 4, "holdout": 4}.items():
        schema.write(prepare.rows(split, count, SEED), folder / f"{split}.parquet")
    report = validate.stamped(folder)
    if report.blocking:
        raise RuntimeError(f"the generated rows are refused: {report.blocking}")


def make_model(folder: Path, device: str) -> None:
    """Random weights and the miniature's tokenizer; on CUDA with Qwen3.5-0.8B's width and heads, four layers deep."""
    from data.miniature import model

    tokenizer = model.build_tokenizer()
    config = model.build_config(tokenizer)
    if device == "cuda":
        text, vision = config.text_config, config.vision_config
        text.hidden_size, text.intermediate_size = 1024, 3584
        text.num_attention_heads, text.num_key_value_heads, text.head_dim = 8, 2, 256
        text.linear_num_key_heads = text.linear_num_value_heads = 16
        text.linear_key_head_dim = text.linear_value_head_dim = 128
        text.rope_parameters["mrope_section"] = [11, 11, 10]
        text.initializer_range = 0.02
        vision.hidden_size, vision.intermediate_size, vision.num_heads = 768, 3072, 12
        vision.out_hidden_size = text.hidden_size
    model.save(model.build_model(config, SEED), model.build_processor(tokenizer), folder)
