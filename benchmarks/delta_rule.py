"""What a GatedDeltaNet layer costs without a fast kernel: transformers' rule in plain torch, and ours, over the length.

    python -m benchmarks.delta_rule [--tokens 1024 2048 4096 8192] [--heads 4] [--size 128] [--rounds 1] [--threads 1]

Forward and backward of one sequence in float32, in turns; the least of the rounds counts. Bytes are those of every
tensor that an operation writes, views apart: what grows with the square of the length shows there first. Qwen3.5-4B has
32 heads of 128: eight times the bytes of the default.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vopd.backbone.delta_rule import gated_delta_rule

Rule = Callable[..., tuple[Tensor, Any]]
GB = 1e9


class Written(TorchDispatchMode):
    """Bytes of the results of all operations that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


def of_transformers(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Any]:
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    found: tuple[Tensor, Any] = torch_chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)
    return found


RULES: dict[str, Rule] = {"transformers": of_transformers, "ours": gated_delta_rule}


def inputs(tokens: int, heads: int, size: int) -> list[Tensor]:
    """q, k, v (1, T, H, D), the decays' logarithms and write strengths (1, T, H)."""
    random = torch.Generator().manual_seed(tokens)
    vectors = [torch.randn(1, tokens, heads, size, generator=random) for _ in range(3)]
    g, beta = (torch.rand(1, tokens, heads, generator=random) for _ in range(2))
    return [x.requires_grad_() for x in (*vectors, -g, beta)]


def once(rule: Rule, given: list[Tensor]) -> tuple[Tensor, ...]:
    """Forward and backward: the gradients."""
    out, _ = rule(*given)
    return torch.autograd.grad(out.square().sum(), given)


def seconds(rule: Rule, given: list[Tensor]) -> float:
    start = time.perf_counter()
    once(rule, given)
    return time.perf_counter() - start


def written(rule: Rule, given: list[Tensor]) -> int:
    with Written() as counted:
        once(rule, given)
    return counted.bytes


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    for name, value in (("heads", 4), ("size", 128), ("rounds", 1), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    print(f"{args.heads} heads of {args.size}, float32, {args.threads} thread(s); forward and backward\n")
    print("| tokens | rule | seconds | GB written | times ours |\n|---|---|---|---|---|")
    for tokens in args.tokens:
        given = inputs(tokens, args.heads, args.size)
        least = dict.fromkeys(RULES, math.inf)
        for _ in range(args.rounds):
            for name, rule in RULES.items():
                least[name] = min(least[name], seconds(rule, given))
        for name, rule in RULES.items():
            share = least[name] / least["ours"]
            print(
                f"| {tokens:,} | {name} | {least[name]:.3g} | {written(rule, given) / GB:.3g} | {share:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
