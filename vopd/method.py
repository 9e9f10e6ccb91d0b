"""The contract: what a post-training method may decide, and nothing else.

A method is one module with two names: `Settings`, a dataclass whose defaults are the vetted values, and
`build(settings) -> Method`. The trainer knows methods only through the fields and calls below; it never asks for
a name. Every contract value it branches on is listed here: VIEWS, WEIGHTS, ROLLOUT_WEIGHTS, ADVANTAGES, PREPARED.

Shapes: C tokens of a chunk, V vocabulary, B sequences (of a micro-batch in `loss`, of a whole step in `rewards` and
`prepare`), T response tokens (right padded).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vopd import bounds
from vopd.common import heartbeat, recipe_errors
from vopd.errors import UserError
from vopd.views import VIEWS

if TYPE_CHECKING:  # settings are read and refused without the second that importing torch takes
    import torch

WEIGHTS = ("current", "initial", "ema", "trust_region")
RATED = ("ema", "trust_region")
ROLLOUT_WEIGHTS = ("current", "initial")
# verl's registered estimators that need rewards and groups alone. Another one: `prepare` returns `advantages`.
ADVANTAGES = ("grpo", "gpg", "opo", "reinforce_plus_plus_baseline", "rloo")
PREPARED = ("weights", "kept", "advantages")
# Scored beside a method's own outputs; a method may return one itself, to have a gradient through it.
ALWAYS_SCORED = ("log_prob", "entropy")


@dataclass(frozen=True)
class ScoreChunk:
    """What a method's `score` sees of C consecutive response tokens (of one row or of several).

    All logits are float32 at temperature 1 over the full vocabulary, and not normalised. Gradient reaches
    `student_logits_CV` only. `extras` are the per-token tensors of the context, cut to the chunk.
    """

    student_logits_CV: torch.Tensor
    scorer_logits: Mapping[str, torch.Tensor]
    tokens_C: torch.Tensor
    extras: Mapping[str, torch.Tensor]


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

    def __str__(self) -> str:
        """As a table states it, such as `ema(0.05) on crop`."""
        return f"{self.weights}{f'({self.rate})' if self.weights in RATED else ''} on {self.view}"


@dataclass(frozen=True)
class Rollout:
    """Who generates, and which groups are trained on.

    Args:
        view: what the generating policy sees, a name in `vopd.views.VIEWS`.
        weights: `current` (the student's, synchronised after each update) or `initial`: all rollouts of the run are
            generated before the first update, stored in the run folder, and trained on from there.
        filter_groups: whether groups that are all correct or all incorrect are discarded and replaced by the next
        prompts
            (verl's dynamic sampling, on correctness whatever the reward).
    """

    view: str = "full"
    weights: str = "current"
    filter_groups: bool = False


@dataclass(frozen=True)
class Rollouts:
    """One step's responses, for `rewards` and `prepare`; rows in canonical order (prompt, rollout index).

    Attributes:
        correct_B: the verdict of the one answer parser.
        rewards_B: float32; 1.0 where correct until `Method.rewards` has given others.
        truncated_B: whether the response has no end of its own.
        lengths_B: response tokens.
        group_B: equal for the rollouts of one prompt, counting from 0.
        limit: most tokens a response may have.
    """

    correct_B: torch.Tensor
    rewards_B: torch.Tensor
    truncated_B: torch.Tensor
    lengths_B: torch.Tensor
    group_B: torch.Tensor
    limit: int


@dataclass(frozen=True)
class UpdateBatch:
    """What `loss` may use beside the per-token numbers of one micro-batch.

    The three counts are global (all micro-batches, all ranks): they make the loss of one optimiser update the same
    for every split of its rows. FSDP averages gradients over ranks, hence `ranks` as a factor. Rows that `prepare`
    did not keep have a mask of zeros and are not counted.

    `old_log_probs_BT` is the trainer's policy before the first update of the batch, where the method declares
    `needs_old_log_probs`; `rollout_log_probs_BT` the policy that generated, as vLLM reported it, where it did. Both
    are of the sampled tokens, without gradient, and 0 in the padding.
    """

    rows: int
    tokens: int
    ranks: int
    advantages_BT: torch.Tensor | None = None
    old_log_probs_BT: torch.Tensor | None = None
    rollout_log_probs_BT: torch.Tensor | None = None
    weights_B: torch.Tensor | None = None
    kept_B: torch.Tensor | None = None


def _weighted(values_BT: torch.Tensor, batch: UpdateBatch) -> torch.Tensor:
    return values_BT if batch.weights_B is None else values_BT * batch.weights_B[:, None]


def sequence_mean(values_BT: torch.Tensor, mask_BT: torch.Tensor, batch: UpdateBatch) -> torch.Tensor:
    """Mean over a response's tokens (1/|y|), then mean over the update's rows (Vision-OPD, eq. 3-4).

    Rows are multiplied by their weights where `prepare` gave some; the divisor stays the number of rows.
    """
    per_row_B = (_weighted(values_BT, batch) * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1)
    return per_row_B.sum() * batch.ranks / max(batch.rows, 1)


def token_mean(values_BT: torch.Tensor, mask_BT: torch.Tensor, batch: UpdateBatch) -> torch.Tensor:
    """Mean over all response tokens of the update (DAPO, eq. 8); rows weighted as in `sequence_mean`."""
    return (_weighted(values_BT, batch) * mask_BT).sum() * batch.ranks / max(batch.tokens, 1)


@dataclass(frozen=True)
class Method:
    """Base class of all methods; subclasses override `score`, `loss` and `record`, where needed the rest.

    Attributes:
        outputs: names of the per-token tensors that `score` returns, in a fixed order. Their means are recorded.
            `log_prob` and `entropy` are recorded in any case; a mean called `divergence` is watched for collapse.
        scorers: named policies that score the response; their logits reach `score` under the same names.
        rollout: who generates, and which groups are kept.
        student_view: what the student is trained on, behind the same responses.
        advantage: a name in ADVANTAGES or None: no estimator is called then.
        needs_old_log_probs: whether the loss takes a ratio to the policy before the first update of a batch.
        least_vocabulary: fewest entries that the model's vocabulary must have, such as the k of a top k; a model with
            fewer is refused before anything starts.
    """

    outputs: tuple[str, ...]
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    rollout: Rollout = field(default_factory=Rollout)
    student_view: str = "full"
    advantage: str | None = None
    needs_old_log_probs: bool = False
    least_vocabulary: int = 1

    @property
    def views(self) -> tuple[str, ...]:
        """All views of a run, the one that generates first."""
        scorers = [scorer.view for scorer in self.scorers.values()]
        return tuple(dict.fromkeys([self.rollout.view, self.student_view, *scorers]))

    def rewards(self, rollouts: Rollouts) -> torch.Tensor:
        """Rewards (B,), float32, of one step's responses: 1.0 where correct unless overridden."""
        return rollouts.correct_B.float()

    def prepare(self, rollouts: Rollouts) -> Mapping[str, torch.Tensor]:
        """What the update needs to know of the whole step; any of the names in PREPARED.

        `weights` (B,): factors of the rows' terms in the loss, also in `UpdateBatch.weights_B`. `kept` (B,) bool: the
        other rows drop out of mask and counts; an update without any kept row changes nothing and is counted.
        `advantages` (B,): in place of a registered estimator.
        """
        return {}

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


def final_views(method: Method) -> list[str]:
    """The views in which a run's test questions are answered before and after it."""
    return list(dict.fromkeys(["full", "crop", *method.views]))


def check(method: Method) -> Method:
    """Raise UserError where a method has a value outside the contract."""
    for view in method.views:
        if view not in VIEWS:
            raise UserError(f"The method asks for the view '{view}'; choose one of {', '.join(VIEWS)}.")
    if method.rollout.weights not in ROLLOUT_WEIGHTS:
        raise UserError(
            f"The method generates with weights '{method.rollout.weights}'; choose one of "
            f"{', '.join(ROLLOUT_WEIGHTS)}."
        )
    if method.rollout.filter_groups and method.rollout.weights == "initial":
        raise UserError("Groups cannot be filtered where all rollouts are generated before the first update.")
    if method.advantage is not None and method.advantage not in ADVANTAGES:
        raise UserError(
            f"The method asks for the advantage '{method.advantage}'; choose one of {', '.join(ADVANTAGES)}, or "
            "return `advantages` from prepare."
        )
    for name, scorer in method.scorers.items():
        if scorer.weights not in WEIGHTS:
            raise UserError(
                f"Scorer '{name}' asks for weights '{scorer.weights}'; choose one of {', '.join(WEIGHTS)}."
            )
        if scorer.weights in RATED and not 0.0 < scorer.rate <= 1.0:
            raise UserError(
                f"Scorer '{name}': the rate of {scorer.weights} is {scorer.rate}; give one in (0, 1]."
            )
    if not method.outputs:
        raise UserError("The method declares no outputs; name the per-token numbers that score returns.")
    return method


def place(method: Method, call: str) -> str:
    """Place of a method's function, `FILE, line N, in NAME`; empty if it is unknown."""
    function = getattr(type(method), call)
    try:
        return f"{inspect.getsourcefile(function)}, line {inspect.getsourcelines(function)[1]}, in {call}"
    except (OSError, TypeError):
        return ""


@contextmanager
def calling(method: Method, call: str) -> Iterator[None]:
    """Around a call of a method's function: known while it lasts (`vitals`), and a UserError of it says where it is."""
    with heartbeat.calling(f"{call} of the recipe"):
        try:
            yield
        except UserError as error:
            raise UserError(f"{error} [{place(method, call)}]") from error


class _FromSource(SourceFileLoader):
    """Compiles the file as it is: Python's kept bytecode is told by whole seconds and size, and litters the folder."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_module(name: str, beside: Path | None = None) -> ModuleType:
    """Import a method module by dotted name, or by file path relative to the recipe that names it.

    Raises:
        UserError: there is none, or importing it fails; of a mistake in it, file and line.
    """
    if not name.endswith(".py"):
        return _import(name)
    path = (beside / name) if beside else Path(name)
    if not path.is_file():
        raise UserError(f"method.module={name}: no such file ({path}).")
    module_name = f"vopd_recipe_{path.stem}"
    loader = _FromSource(module_name, str(path))
    spec = importlib.util.spec_from_file_location(module_name, path, loader=loader)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    with recipe_errors.told(IMPORTING, path):
        spec.loader.exec_module(module)
    return module


def _import(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"method.module={name!r}: not a module name; give a .py file or a dotted name.")
    with recipe_errors.told(IMPORTING):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # it is there, and imports something that is not
            raise UserError(f"method.module={name}: no such module ({error.name} not found).") from error


IMPORTING = "importing the recipe's module"


def typed_settings(kind: type, values: Mapping[str, Any], own: Path | None = None) -> Any:
    """The `Settings` of a method with these values.

    Args:
        kind: the class.
        values: by name.
        own: the module's file, for mistakes in it.

    Raises:
        UserError: unknown key, wrong type, a value outside its bound.
    """
    try:
        with recipe_errors.told("making the recipe's Settings", own):
            typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
    except UserError as error:
        cause = error.__cause__
        if not isinstance(cause, OmegaConfBaseException):
            raise
        key = f"method.{cause.full_key}" if cause.full_key else "method"
        raise UserError(f"{key}: {str(cause).splitlines()[0]}") from cause
    bounds.check(kind, typed, "method.")
    return typed


def build(settings: Mapping[str, Any], beside: Path | None = None) -> Method:
    """Make the method that a resolved `method:` section describes.

    Raises:
        UserError: unknown module, unknown key, wrong type, a value outside its bound or the contract, or a mistake in
            the module, with file and line.
    """
    values = dict(settings)
    module = load_module(str(values.pop("module")), beside)
    own = Path(module.__file__) if module.__file__ else None
    kind = _settings_class(module, str(settings["module"]))
    typed = typed_settings(kind, values, own)
    if not callable(getattr(module, "build", None)):
        raise UserError(f"method.module={settings['module']} has no `build`; see docs/adding_a_recipe.md.")
    with recipe_errors.told("making the method", own):
        method = module.build(typed)
        if not isinstance(method, Method):
            raise UserError(
                f"method.module={settings['module']}: build returned a {type(method).__name__}; "
                "return a vopd.method.Method."
            )
        return check(method)


def of(config: Any) -> Method:
    """The method of a run's settings (a DictConfig, or the same tree of dicts).

    Raises:
        UserError: as `build`.
    """
    tree: Any = OmegaConf.to_container(config.method, resolve=True)
    return build(tree, Path(config.recipe_folder) if config.recipe_folder else None)


def default_settings(module_name: str, beside: Path | None = None) -> dict[str, Any]:
    """The default values of a method module's Settings, in order.

    Raises:
        UserError: as `build`.
    """
    module = load_module(module_name, beside)
    kind = _settings_class(module, module_name)
    own = Path(module.__file__) if module.__file__ else None
    with recipe_errors.told("making the recipe's Settings", own):
        return {f.name: getattr(kind(), f.name) for f in dataclasses.fields(kind)}


def _settings_class(module: ModuleType, name: str) -> type:
    kind = getattr(module, "Settings", None)
    if kind is None:
        raise UserError(f"method.module={name} has no `Settings`; see docs/adding_a_recipe.md.")
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise UserError(f"method.module={name}: Settings is not a dataclass; put @dataclass above it.")
    return kind
