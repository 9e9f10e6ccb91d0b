"""What a method's functions returned, checked against the contract; a mistake is one sentence in the recipe's terms."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch

from vopd.errors import UserError
from vopd.method import ALWAYS_SCORED, PREPARED, Method, calling, place


def checked_scores(scored: Any, names: Collection[str], tokens_C: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `score` returned; UserError unless it is one number per token (C,) for each of these names."""
    if not isinstance(scored, Mapping):
        raise UserError(f"score returned {_kind(scored)}; give a mapping of names to tensors.")
    for name in names:
        if name not in scored:
            raise UserError(
                f"score did not return '{name}', which outputs declares; it gave {sorted(scored)}."
            )
    for name, values in scored.items():
        if name not in names and name not in ALWAYS_SCORED:
            raise UserError(
                f"score returned '{name}', which outputs doesn't declare; declared are {sorted(names)}."
            )
        if not isinstance(values, torch.Tensor) or values.shape != tokens_C.shape:
            raise UserError(
                f"score returned '{name}' as {_kind(values)}; it must be one number per token, a tensor of shape "
                f"{tuple(tokens_C.shape)}."
            )
        if not values.is_floating_point():
            raise UserError(f"score returned '{name}' of type {values.dtype}; give floats.")
    return dict(scored)


def checked_loss(loss: Any) -> torch.Tensor:
    """What `loss` returned; UserError unless it is a scalar through which there is a gradient."""
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
        raise UserError(f"loss returned {_kind(loss)}; give a scalar tensor.")
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise UserError(
            "loss returned a scalar that does not depend on the student; its gradient would be zero."
        )
    return loss


def checked_rewards(rewards_B: Any, rows: int) -> torch.Tensor:
    """What `rewards` returned, float32; UserError unless it is a finite number per rollout."""
    if not isinstance(rewards_B, torch.Tensor) or tuple(rewards_B.shape) != (rows,):
        raise UserError(f"rewards returned {_kind(rewards_B)}; give a tensor of shape ({rows},).")
    if not torch.isfinite(rewards_B).all():
        raise UserError("rewards returned a value that is not finite.")
    return rewards_B.to(torch.float32)


def checked_record(method: Method) -> dict[str, Any]:
    """What `record` returned; UserError unless a summary can hold it. Asked before a run, not at its end."""
    with calling(method, "record"):
        try:
            record = method.record()
            json.dumps(record, allow_nan=False)
        except NotImplementedError as error:
            raise UserError(
                "The method has no record; give the row of settings that a table must show."
            ) from error
        except (TypeError, ValueError) as error:
            raise UserError(f"record returned what JSON cannot hold ({error}).") from error
    if not isinstance(record, dict):
        raise UserError(f"record returned {_kind(record)}; give a dict. [{place(method, 'record')}]")
    return record


def _kind(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
    return f"{'a tensor' if shape else f'a {type(value).__name__}'}{shape}"


def checked(prepared: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """What `prepare` returned, in the types that travel; UserError for other names, shapes or types."""
    if not isinstance(prepared, Mapping):
        raise UserError(f"prepare returned {_kind(prepared)}; give a mapping of names to tensors.")
    found: dict[str, torch.Tensor] = {}
    for name, values_B in prepared.items():
        if name not in PREPARED:
            raise UserError(f"prepare returned '{name}'; it may return {', '.join(PREPARED)}.")
        if not isinstance(values_B, torch.Tensor):
            raise UserError(
                f"prepare returned {name} as {_kind(values_B)}; give a tensor of shape ({rows},)."
            )
        if tuple(values_B.shape) != (rows,):
            raise UserError(f"prepare returned {name} of shape {tuple(values_B.shape)}; give ({rows},).")
        if (values_B.dtype == torch.bool) != (name == "kept"):
            raise UserError(
                f"prepare returned {name} of type {values_B.dtype}; kept is bool, the others float."
            )
        if not torch.isfinite(values_B).all():
            raise UserError(f"prepare returned {name} with a value that is not finite.")
        found[name] = values_B if name == "kept" else values_B.to(torch.float32)
    return found
