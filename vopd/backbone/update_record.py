"""What metrics.jsonl says about an update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vopd.backbone.rows import Answer


def update_line(
    step: int,
    epoch: int,
    group_size: int,
    records: Sequence[Answer],
    tags: Sequence[Mapping[str, Any]],
    discarded: Mapping[str, int],
    metrics: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The line of one update.

    Args:
        step: counting from 1.
        epoch: counting from 0.
        group_size: rollouts a prompt.
        records: one a rollout, as the rollout workers wrote them.
        tags: one a rollout, with `prompt_len` in tokens and `stored_bytes`.
        discarded: tokens of rollouts that were sampled and not trained on, by why.
        metrics: what the update returned.
        seconds: by phase.
    """
    lengths = [r["response_tokens"] for r in records]
    return {
        "step": step,
        "epoch": epoch,
        "prompts": len(records) // group_size,
        "rollouts": len(records),
        "tokens_generated": sum(lengths) + discarded["tokens_evicted"] + discarded["tokens_surplus"],
        **discarded,
        "tokens_prompt": sum(t["prompt_len"] for t in tags if "prompt_len" in t),
        "stored_bytes": round(sum(t.get("stored_bytes", 0.0) for t in tags)),
        "response_length": sum(lengths) / len(lengths),
        "response_length_max": max(lengths),
        "truncated": sum(r["truncated"] for r in records) / len(records),
        "rollout_accuracy": sum(r["correct"] for r in records) / len(records),
        **renamed(metrics),
        **{f"seconds/{k}": v for k, v in seconds.items()},
    }


def renamed(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """`update/token/divergence` -> `divergence`, `update/seconds/student` -> `seconds/student`, and so on."""
    line = {}
    for key, value in metrics.items():
        name = key.removeprefix("update/").removeprefix("token/")
        if isinstance(value, int | float) and not (
            isinstance(value, float) and math.isnan(value) and "mfu" in name
        ):
            line[{"update_loss": "loss"}.get(name, name)] = value
    return line
