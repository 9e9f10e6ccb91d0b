"""The reward by our parser, as verl's `reward.custom_reward_function` calls it."""

from __future__ import annotations

from typing import Any

from vopd.evaluation.scoring import is_correct, parse_answer


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]
) -> dict[str, float]:
    """1 where the answer is correct by rule; `extra_info` holds the row's options and type of answer."""
    kind = extra_info["answer_type"]
    parsed = parse_answer(solution_str, kind, list(extra_info["options"]))
    return {"score": float(is_correct(parsed, ground_truth, kind))}
