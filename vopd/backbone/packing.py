"""Keeps a GatedDeltaNet's state inside its sequence where several are packed and the fast kernels are missing.

verl 0.9.1 gives `cu_seqlens` to a module's delta rule if the rule's signature takes it, and else calls the rule once
per sequence. transformers' plain torch rule takes any keyword and ignores it: the state of one sequence runs on into
the next, without a message. A rule whose signature says what it takes is all that verl needs.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn


def swallows_boundaries(rule: Callable[..., Any]) -> bool:
    """Whether `rule` accepts `cu_seqlens` only because it accepts every keyword."""
    parameters = signature(rule).parameters
    return "cu_seqlens" not in parameters and any(
        p.kind == Parameter.VAR_KEYWORD for p in parameters.values()
    )


def honest(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The same delta rule with a signature of its real arguments."""

    def delta_rule(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
    ) -> Any:
        return rule(
            query,
            key,
            value,
            g=g,
            beta=beta,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        )

    return delta_rule


def respect_boundaries(model: nn.Module) -> None:
    """Make every GatedDeltaNet layer of `model` safe to be given packed sequences by verl."""
    for module in model.modules():
        rule = getattr(module, "chunk_gated_delta_rule", None)
        if rule is not None and swallows_boundaries(rule):
            module.chunk_gated_delta_rule = honest(rule)  # type: ignore[assignment]
