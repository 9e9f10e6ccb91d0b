"""A run's settings: typed defaults, a profile (hardware, model, data size), a recipe (a method), the user's overrides.

Later ones go first: class defaults < profile < recipe < overrides. Overrides are in Hydra's grammar
(`seed=1 method.top_k=20`); keys below `verl.` reach verl's own tree. Unknown keys, wrong types and values outside the
bounds declared beside the defaults are errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from vopd import bounds, method_settings
from vopd.bounds import Each, Range, above, bounded, one_of, within
from vopd.common import overrides, yaml_files
from vopd.common.paths import ROOT
from vopd.errors import UserError
from vopd.method import default_settings, typed_settings

RECIPES = ROOT / "recipes"
OPEN = ("verl", "rollout.chat_template")
"""Sections without a fixed set of keys: verl's own tree, which is checked later, and a chat template's arguments."""
FIXED = {
    "recipe": "it is the first argument of the command",
    "recipe_folder": "it is the folder of the recipe's file",
    "method.module": "it belongs to the recipe; write a recipe of your own for another module",
}
METHOD = "method"
SAME_AS = "same_as"  # a recipe file that holds this alone is the recipe it names
DEFAULT_PROFILE = "miniature"
MOST_ROWS = 100_000_000  # of a file or a batch; only there to catch a slip
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
CPU_ATTENTION = ("sdpa", "eager")
MOST_CPU_RANKS = 4  # a rank takes 3 of the 16 CPUs that Ray is told of (verl_cpu.yaml), the rollout the rest


@dataclass
class Model:
    """A Hugging Face folder or hub id; weights, processor and chat template come from there."""

    path: str = MISSING
    attention: str = one_of("sdpa", *ATTENTION)


@dataclass
class Data:
    """Folder with the splits train, validation, test and perhaps holdout; `prepare` is the module that makes it."""

    folder: str = MISSING
    prepare: str | None = None


@dataclass
class Train:
    """Budget and optimiser. Defaults: the settings of the Vision-OPD paper's script."""

    steps: int = within(65, 1, 1_000_000)
    prompts: int = within(96, 1, 100_000)
    rollouts: int = within(8, 1, 10_000)
    updates_per_batch: int = within(1, 1, 100_000)
    lr: float = within(2e-6, 0, 1)
    betas: list[float] = field(
        default_factory=lambda: [0.9, 0.999], metadata=bounded(Each(Range(0, 1, open_above=True), 2))
    )
    weight_decay: float = within(0.01, 0, 10)
    warmup_steps: int = within(10, 0, 1_000_000)
    grad_clip: float = above(1.0, 0, 1_000_000)
    chunk: int = within(1024, 1, 10_000_000)
    max_tokens_per_micro_batch: int = within(16384, 1, 100_000_000)
    packed: bool = True
    gradient_checkpointing: bool = True
    # Keep teachers in the host's memory: 4 bytes a parameter and teacher of GPU memory less, two copies a pass.
    teachers_on_host: bool = False
    # Reduce gradients over the ranks once an update, not once a micro-batch; whole gradients then stay on every rank.
    reduce_once: bool = False
    # A checkpoint every so many updates (0: not by count), every so many minutes, and before an evaluation.
    save_every: int = within(50, 0, 1_000_000)
    save_minutes: float = above(3.0, 0, 1_000_000)
    # How many checkpoints stay; each can be exported and evaluated (docs/resuming.md).
    keep: int = within(1, 1, 1_000_000)
    max_skipped_updates: int = within(5, 1, 1_000_000)
    # Where groups are filtered: most prompts a step may draw in their place, in batches of `prompts`.
    max_refills: int = within(10, 0, 1_000_000)


@dataclass
class Rollout:
    """Sampling. A prompt over the limit is an error; a response at the limit is counted as truncated.

    `temperature` and `top_p` are 1: the trainer scores under the model's own distribution.
    """

    temperature: float = above(1.0, 0, 10)
    top_p: float = above(1.0, 0, 1)
    max_prompt_tokens: int = within(8192, 1, 10_000_000)
    max_response_tokens: int = within(1024, 1, 10_000_000)
    max_batch: int = within(256, 1, 100_000)
    cache_gib: float = within(0.0, 0, 10_000)
    memory_share: float = above(0.5, 0, 1)
    tensor_parallel: int = within(1, 1, 1024)
    # Share of max_response_tokens that a response may have in training; evaluation always has all of it.
    train_share: float = above(1.0, 0, 1)
    # Store each step's rollouts in the run folder (rollouts/); train on such a folder instead of generating.
    record: bool = False
    replay: str | None = None
    chat_template: dict[str, Any] = field(default_factory=dict)


@dataclass
class Evaluate:
    """Greedy answers to test and held-out questions before and after; a validation set every so many steps (0: never).

    Rows are the first so many of a split (0: all of it).
    """

    test_rows: int = within(1024, 0, MOST_ROWS)
    holdout_rows: int = within(512, 0, MOST_ROWS)
    validation_rows: int = within(128, 0, MOST_ROWS)
    every: int = within(25, 0, 1_000_000)
    batch: int = within(512, 1, 1_000_000)


@dataclass
class Hardware:
    """`device` is cpu or cuda; the needs are checked before anything starts."""

    device: str = one_of("cpu", "cpu", "cuda")
    devices_per_node: int = within(1, 1, 64)
    nodes: int = within(1, 1, 10_000)
    memory_gib: float = within(9, 0, 1_000_000)
    disk_gib: float = within(2, 0, 1_000_000)


@dataclass
class Logging:
    """verl's trackers, beside metrics.jsonl, which is always written."""

    tensorboard: bool = False
    wandb: bool = False
    project: str = "vopd"


@dataclass
class Run:
    """Everything a run can be told."""

    seed: int = within(0, 0, 2**31 - 1)  # torch, numpy and vLLM take it; verl adds a rank to it
    run_dir: str = "${oc.env:VOPD_RUNS,runs}/${profile}/${recipe}/seed${seed}"
    recipe: str = MISSING
    recipe_folder: str | None = None
    profile: str = DEFAULT_PROFILE
    export: str = one_of(
        "bfloat16", "float32", "bfloat16", "float16", ""
    )  # "": no trained weights are written
    method: dict[str, Any] = MISSING
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    rollout: Rollout = field(default_factory=Rollout)
    evaluate: Evaluate = field(default_factory=Evaluate)
    hardware: Hardware = field(default_factory=Hardware)
    logging: Logging = field(default_factory=Logging)
    verl: dict[str, Any] = field(default_factory=dict)


def recipes() -> list[str]:
    """Names of the recipes that come with the repository."""
    known = (p.relative_to(RECIPES).with_suffix("").as_posix() for p in RECIPES.rglob("*.yaml"))
    return sorted(name for name in known if not name.startswith("profiles/"))


def defaults() -> DictConfig:
    """The settings that every run has, on the default profile; a method's own come with its module."""
    path = find_profile(DEFAULT_PROFILE)
    content = {key: value for key, value in _read(path).items() if key != METHOD}
    settings = _tree(OmegaConf.structured(Run)).with_file(path, content)
    settings.profile = path.stem
    shared = [key for key in map(str, settings) if key not in (METHOD, "recipe", "recipe_folder")]
    return OmegaConf.masked_copy(settings, shared)


def keys() -> list[str]:
    """Settings that every run has; a method's own come with its module."""
    return _tree(OmegaConf.structured(Run)).keys()


def find_recipe(name: str) -> Path:
    """Path of a recipe given by name (below recipes/) or by file."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise UserError(
            f"There is no recipe '{name}'; known are {', '.join(recipes())}, or give the path of a YAML file."
        )
    return path.resolve()


def find_profile(name: str) -> Path:
    """Path of a profile given by name (below recipes/profiles/) or by file."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / "profiles" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (RECIPES / "profiles").glob("*.yaml")))
        raise UserError(f"There is no profile '{name}'; known are {known}, or give the path of a YAML file.")
    return path.resolve()


def load(recipe_name: str, given: list[str]) -> DictConfig:
    """The resolved settings of a run.

    Args:
        recipe_name: name or path of a recipe.
        given: Hydra overrides, `key=value`.

    Raises:
        UserError: unknown recipe, profile or key, wrong type, an invalid value, unreadable YAML.
    """
    recipe_path, recipe = _recipe(find_recipe(recipe_name))
    profile_name, given = overrides.profile(given, DEFAULT_PROFILE)
    profile_path = find_profile(profile_name)
    profile = _read(profile_path)
    base = OmegaConf.structured(Run)
    base.recipe = recipe_path.stem
    base.recipe_folder = str(recipe_path.parent)
    base.profile = profile_path.stem
    for path, content in ((profile_path, profile), (recipe_path, recipe)):
        base = _tree(base).with_file(path, {key: value for key, value in content.items() if key != METHOD})
    _check_early(base, given)
    base.method = _method_settings(recipe, profile, recipe_path)
    OmegaConf.set_struct(base.method, True)
    config = _checked(_tree(base).override(given))
    if kind := method_settings.alone(config.method.module):
        values = {str(key): value for key, value in config.method.items() if key != "module"}
        typed_settings(kind, values)
    return config


def _check_early(base: DictConfig, given: list[str]) -> None:
    """Refuse what can be refused without the method's module, whose imports take a second or more."""
    early = [override for override in given if not override.startswith(METHOD) and "${" not in override]
    settings = base.copy()
    settings.method = {}
    _checked(_tree(settings).override(early))


def _method_settings(recipe: dict[str, Any], profile: dict[str, Any], recipe_path: Path) -> dict[str, Any]:
    chosen = dict(recipe.get(METHOD, {}))
    if not chosen.get("module"):
        raise UserError(f"{recipe_path}: method.module is missing; name the module that holds the method.")
    module = str(chosen["module"])
    kind = method_settings.alone(module)
    defaults = (
        {f.name: getattr(kind(), f.name) for f in dataclasses.fields(kind)}
        if kind
        else default_settings(module, recipe_path.parent)
    )
    unknown = sorted(set(chosen) - {"module"} - set(defaults))
    if unknown:
        raise UserError(
            f"{recipe_path}: method has no key '{unknown[0]}'; known are {', '.join(sorted(defaults))}."
        )
    of_profile = {k: v for k, v in profile.get(METHOD, {}).items() if k in defaults}
    return {"module": chosen.pop("module"), **defaults, **of_profile, **chosen}


def _tree(settings: DictConfig) -> overrides.Tree:
    return overrides.Tree(settings, OPEN, FIXED)


def _checked(config: DictConfig) -> DictConfig:
    """Refuse values outside their bounds, and settings that do not go together."""
    bounds.check(Run, config)
    for fault in _faults(config):
        raise UserError(fault)
    # A file of the run holds these settings, and what reads it would resolve once more.
    overrides.check_interpolations("the settings", OmegaConf.to_container(config))
    return config


def _faults(config: DictConfig) -> Iterator[str]:
    """What cannot work together, as sentences."""
    train, rollout, hardware = config.train, config.rollout, config.hardware
    yield from _sampling_faults(config)
    ranks = hardware.nodes * hardware.devices_per_node
    rows, parts = train.prompts * train.rollouts, train.updates_per_batch * ranks
    if rows % parts:
        yield (
            f"train.prompts={train.prompts} x train.rollouts={train.rollouts} are {rows} rows, which cannot be "
            f"dealt out evenly to train.updates_per_batch={train.updates_per_batch} updates on {ranks} "
            f"device{'s' * (ranks > 1)}; give numbers whose product is a multiple of {parts}."
        )
    if ranks % rollout.tensor_parallel:
        yield (
            f"rollout.tensor_parallel={rollout.tensor_parallel} does not divide the {ranks} "
            f"device{'s' * (ranks > 1)} of hardware.nodes x hardware.devices_per_node."
        )
    if (
        longest := rollout.max_prompt_tokens + rollout.max_response_tokens
    ) > train.max_tokens_per_micro_batch:
        yield (
            f"rollout.max_prompt_tokens={rollout.max_prompt_tokens} + rollout.max_response_tokens="
            f"{rollout.max_response_tokens} are {longest} tokens, more than train.max_tokens_per_micro_batch="
            f"{train.max_tokens_per_micro_batch}, which holds whole rows; give that {longest} or more, or shorten them."
        )
    for split in ("test", "holdout"):
        if config.evaluate[f"{split}_rows"] == 1:
            yield f"evaluate.{split}_rows=1 allows no interval; give 2 or more, or 0 for all of the split."
    if not config.run_dir.strip():
        yield "run_dir is empty; give a folder, or leave it out."
    yield from _offload_faults(config)
    if hardware.device != "cpu":
        return
    if train.teachers_on_host:
        yield "train.teachers_on_host=true needs hardware.device=cuda; on a CPU teachers are on the host anyway."
    if hardware.nodes > 1:
        yield f"hardware.nodes={hardware.nodes} needs hardware.device=cuda; a run on CPUs has one machine."
    if ranks > MOST_CPU_RANKS:
        yield f"hardware.devices_per_node={ranks}: on CPUs at most {MOST_CPU_RANKS} ranks fit."
    if config.model.attention not in CPU_ATTENTION:
        yield (
            f"model.attention={config.model.attention} needs hardware.device=cuda; on a CPU take "
            f"{' or '.join(CPU_ATTENTION)}."
        )
    if rollout.tensor_parallel > 1:
        yield "rollout.tensor_parallel must be 1 where hardware.device is cpu."
    if rollout.cache_gib == 0:
        yield "rollout.cache_gib=0: on a CPU vLLM's cache has the size given here; give e.g. 0.25."


def _sampling_faults(config: DictConfig) -> Iterator[str]:
    """The trainer scores what was sampled at temperature 1 over the whole vocabulary; anything else would be biased."""
    why = (
        "must be 1: the trainer scores responses under the model's own distribution, at temperature 1 over the "
        "whole vocabulary, and rollouts drawn from another one would bias every method."
    )
    for key in ("temperature", "top_p"):
        if config.rollout[key] != 1:
            yield f"rollout.{key}={config.rollout[key]:g} {why}"
    own = OmegaConf.select(config.verl, "actor_rollout_ref.rollout") or {}
    for key in ("temperature", "top_p", "top_k", "repetition_penalty"):
        if key in own:
            yield f"verl.actor_rollout_ref.rollout.{key} is not to be set: rollout.temperature and rollout.top_p {why}"


def _offload_faults(config: DictConfig) -> Iterator[str]:
    """verl's own ways to keep weights and momenta on the host."""
    key = "verl.actor_rollout_ref.actor.fsdp_config"
    own = OmegaConf.select(config, key) or {}
    if own.get("offload_policy"):
        yield (
            f"{key}.offload_policy=true is not supported: FSDP2 reads its copies on the host while teachers change "
            f"places with them; take {key}.param_offload=true and {key}.optimizer_offload=true."
        )
    for name in ("param_offload", "optimizer_offload"):
        if own.get(name) and config.hardware.device == "cpu":
            yield f"{key}.{name}=true needs hardware.device=cuda; on a CPU everything is on the host."


def _recipe(path: Path) -> tuple[Path, dict[str, Any]]:
    """A recipe's file and content; a file that holds `same_as: RECIPE` alone is that recipe under another name."""
    content = _read(path)
    if SAME_AS not in content:
        return path, content
    if len(content) > 1 or not isinstance(content[SAME_AS], str):
        raise UserError(
            f"{path}: {SAME_AS} names another recipe and stands alone; remove the other keys, or it."
        )
    other = find_recipe(content[SAME_AS])
    found = _read(other)
    if SAME_AS in found:
        raise UserError(f"{path}: {other} is itself the same as another recipe; name that one.")
    return other, found


def _read(path: Path) -> dict[str, Any]:
    """A recipe's or profile's content; its sections are mappings, its `${...}` name keys alone."""
    content = yaml_files.read(path)
    for key in ("recipe", "recipe_folder", "profile", "hydra"):
        if key in content:
            raise UserError(f"{path}: {key} cannot be set in a file; give it in the command.")
    if METHOD in content and not isinstance(content[METHOD], dict):
        raise UserError(f"{path}: method is a section; write `method:` with `module: ...` below it.")
    overrides.check_interpolations(str(path), content)
    return content
