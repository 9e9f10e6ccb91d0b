"""The contract: what a post-training method may decide, and nothing else.

A method is one module with two names: `Settings`, a dataclass whose defaults are the vetted values, and
`build(settings) -> Method`. The trainer knows methods only through the fields and calls below; it never asks for
a name. Every contract value it branches on is listed here.

Shapes: C tokens of a chunk, V vocabulary, B sequences of a micro-batch, T response tokens (right padded).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vopd.backbone.head import ScoreChunk
from vopd.errors import UserError
from vopd.views import VIEWS

WEIGHTS = ("current", "initial", "ema", "trust_region")


@dataclass(frozen=True)
class Scorer:
    """One policy that scores the student's own response without gradient.

    Args:
        view: what it sees, a name in `vopd.views.VIEWS`.
        weights: whose weights it has: `current` (the student's), `initial` (frozen at the start), `ema`
            (exponential moving average of the student) or `trust_region`
            (p proportional to p_initial^(1-rate) * p_current^rate).
        rate: EMA rate, or the exponent of the current policy for `trust_region`; unused otherwise.
    """

    view: str
    weights: str
    rate: float = 0.0


@dataclass(frozen=True)
class Rollout:
    """Who generates: the student (current weights) from this view."""

    view: str = "full"


@dataclass(frozen=True)
class UpdateBatch:
    """What `loss` may use beside the per-token numbers of one micro-batch.

    The three counts are global (all micro-batches, all ranks): they make the loss of one optimiser update the same
    for every split of its rows. FSDP averages gradients over ranks, hence `ranks` as a factor.
    """

    rows: int
    tokens: int
    ranks: int
    advantages_BT: torch.Tensor | None = None
    old_log_probs_BT: torch.Tensor | None = None


def sequence_mean(values_BT: torch.Tensor, mask_BT: torch.Tensor, batch: UpdateBatch) -> torch.Tensor:
    """Mean over a response's tokens (1/|y|), then mean over the update's rows (Vision-OPD, eq. 3-4)."""
    per_row_B = (values_BT * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1)
    return per_row_B.sum() * batch.ranks / batch.rows


def token_mean(values_BT: torch.Tensor, mask_BT: torch.Tensor, batch: UpdateBatch) -> torch.Tensor:
    """Mean over all response tokens of the update (DAPO, eq. 8)."""
    return (values_BT * mask_BT).sum() * batch.ranks / max(batch.tokens, 1)


@dataclass(frozen=True)
class Method:
    """Base class of all methods; subclasses override `score`, `loss` and `record`.

    Attributes:
        outputs: names of the per-token tensors that `score` returns, in a fixed order. Their means are recorded.
        scorers: named policies that score the response; their logits reach `score` under the same names.
        rollout: who generates.
        advantage: an estimator registered in verl (`grpo`, ...) or None: no reward is computed then.
        needs_old_log_probs: whether the loss takes a ratio to the policy before the update.
    """

    outputs: tuple[str, ...]
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    rollout: Rollout = field(default_factory=Rollout)
    advantage: str | None = None
    needs_old_log_probs: bool = False

    def score(self, chunk: ScoreChunk) -> dict[str, torch.Tensor]:
        """Per-token numbers (C,) from the logits (C, V) of student (with gradient) and scorers (without)."""
        raise NotImplementedError

    def loss(
        self, per_token: Mapping[str, torch.Tensor], mask_BT: torch.Tensor, batch: UpdateBatch
    ) -> torch.Tensor:
        """Aggregate the per-token numbers (B, T) to the micro-batch's share of the scalar loss."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """The row of settings that a table must show for this method: anchor, normalisation, clip."""
        raise NotImplementedError


def check(method: Method) -> Method:
    """Raise UserError where a method names a view or weights outside the contract."""
    for view in [method.rollout.view, *(s.view for s in method.scorers.values())]:
        if view not in VIEWS:
            raise UserError(f"The method asks for the view '{view}'; choose one of {', '.join(VIEWS)}.")
    for name, scorer in method.scorers.items():
        if scorer.weights not in WEIGHTS:
            raise UserError(
                f"Scorer '{name}' asks for weights '{scorer.weights}'; choose one of {', '.join(WEIGHTS)}."
            )
        if scorer.weights in ("ema", "trust_region") and not 0.0 < scorer.rate <= 1.0:
            raise UserError(
                f"Scorer '{name}': the rate of {scorer.weights} is {scorer.rate}; give one in (0, 1]."
            )
    if not method.outputs:
        raise UserError("The method declares no outputs; name the per-token numbers that score returns.")
    return method


def load_module(name: str, beside: Path | None = None) -> ModuleType:
    """Import a method module by dotted name, or by file path relative to the recipe that names it."""
    if not name.endswith(".py"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(f"method.module={name}: no such module ({error.name} not found).") from error
    path = (beside / name) if beside else Path(name)
    if not path.is_file():
        raise UserError(f"method.module={name}: no such file ({path}).")
    module_name = f"vopd_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module


def build(settings: Mapping[str, Any], beside: Path | None = None) -> Method:
    """Make the method that a resolved `method:` section describes.

    Raises:
        UserError: unknown module, unknown key, wrong type, or a value outside the contract.
    """
    values = dict(settings)
    module = load_module(str(values.pop("module")), beside)
    for needed in ("Settings", "build"):
        if not hasattr(module, needed):
            raise UserError(
                f"method.module={settings['module']} has no `{needed}`; see docs/adding_a_recipe.md."
            )
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(module.Settings), values))
    except OmegaConfBaseException as error:
        key = f"method.{error.full_key}" if error.full_key else "method"
        raise UserError(f"{key}: {str(error).splitlines()[0]}") from error
    return check(module.build(typed))


def default_settings(module_name: str, beside: Path | None = None) -> dict[str, Any]:
    """The default values of a method module's Settings, in order."""
    module = load_module(module_name, beside)
    return {f.name: getattr(module.Settings(), f.name) for f in dataclasses.fields(module.Settings)}
