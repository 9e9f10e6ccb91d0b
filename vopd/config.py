"""A run's settings: typed defaults, a profile (hardware, model, data size), a recipe (a method), the user's words.

Later ones go first: class defaults < profile < recipe < words. The words are Hydra overrides
(`seed=1 method.top_k=20`); keys below `verl.` reach verl's own tree. Unknown keys and wrong types are errors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vopd.errors import UserError
from vopd.method import default_settings

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
METHOD_OF_PROFILE = "method"


@dataclass
class Model:
    """A Hugging Face folder or hub id; weights, processor and chat template come from there."""

    path: str = MISSING
    attention: str = "sdpa"


@dataclass
class Data:
    """Folder with the splits train, validation, test and perhaps holdout; `prepare` is the module that makes it."""

    folder: str = MISSING
    prepare: str | None = None


@dataclass
class Train:
    """Budget and optimiser. Defaults: the settings of the Vision-OPD paper's script."""

    steps: int = 65
    prompts: int = 96
    rollouts: int = 8
    updates_per_batch: int = 1
    lr: float = 2e-6
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.01
    warmup_steps: int = 10
    grad_clip: float = 1.0
    chunk: int = 1024
    max_tokens_per_micro_batch: int = 16384
    packed: bool = True
    gradient_checkpointing: bool = True
    # A checkpoint every so many updates (0: not by count), every so many minutes, and before an evaluation.
    save_every: int = 50
    save_minutes: float = 3.0
    # How many checkpoints stay; each can be exported and evaluated (docs/resuming.md).
    keep: int = 1
    max_skipped_updates: int = 5
    # Where groups are filtered: most prompts a step may draw in their place, in batches of `prompts`.
    max_refills: int = 10


@dataclass
class Rollout:
    """Sampling. A prompt over the limit is an error; a response at the limit is counted as truncated."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_prompt_tokens: int = 8192
    max_response_tokens: int = 1024
    max_batch: int = 256
    cache_gib: float = 0.0
    memory_share: float = 0.5
    tensor_parallel: int = 1
    # Share of max_response_tokens that a response may have in training; evaluation always has all of it.
    train_share: float = 1.0
    # Store each step's rollouts in the run folder (rollouts/); train on such a folder instead of generating.
    record: bool = False
    replay: str | None = None
    chat_template: dict[str, Any] = field(default_factory=dict)


@dataclass
class Evaluate:
    """Greedy answers before and after on test and hold-out; a small validation set every so many steps (0: never)."""

    test_rows: int = 1024
    holdout_rows: int = 512
    validation_rows: int = 128
    every: int = 25
    batch: int = 512


@dataclass
class Hardware:
    """`device` is cpu or cuda; the needs are checked before anything starts."""

    device: str = "cpu"
    devices_per_node: int = 1
    nodes: int = 1
    memory_gib: float = 9
    disk_gib: float = 2


@dataclass
class Logging:
    """verl's trackers, beside metrics.jsonl, which is always written."""

    tensorboard: bool = False
    wandb: bool = False
    project: str = "vopd"


@dataclass
class Run:
    """Everything a run can be told."""

    seed: int = 0
    run_dir: str = "${oc.env:VOPD_RUNS,runs}/${profile}/${recipe}/seed${seed}"
    recipe: str = MISSING
    recipe_folder: str | None = None
    profile: str = "miniature"
    export: str = "bfloat16"
    method: dict[str, Any] = MISSING
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    rollout: Rollout = field(default_factory=Rollout)
    evaluate: Evaluate = field(default_factory=Evaluate)
    hardware: Hardware = field(default_factory=Hardware)
    logging: Logging = field(default_factory=Logging)
    verl: dict[str, Any] = field(default_factory=dict)


def find_recipe(name: str) -> Path:
    """Path of a recipe given by name (below recipes/) or by file."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.relative_to(RECIPES).with_suffix("").as_posix() for p in RECIPES.rglob("*.yaml"))
        names = ", ".join(k for k in known if not k.startswith("profiles/"))
        raise UserError(f"There is no recipe '{name}'; known are {names}, or give the path of a YAML file.")
    return path.resolve()


def find_profile(name: str) -> Path:
    """Path of a profile given by name (below recipes/profiles/) or by file."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / "profiles" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (RECIPES / "profiles").glob("*.yaml")))
        raise UserError(f"There is no profile '{name}'; known are {known}, or give the path of a YAML file.")
    return path.resolve()


def load(recipe_name: str, words: list[str]) -> DictConfig:
    """The resolved settings of a run.

    Args:
        recipe_name: name or path of a recipe.
        words: Hydra overrides.

    Raises:
        UserError: unknown recipe, profile or key, wrong type, unreadable YAML.
    """
    recipe_path = find_recipe(recipe_name)
    recipe = _read(recipe_path)
    profile_name = next((w.split("=", 1)[1] for w in words if w.startswith("profile=")), "miniature")
    profile_path = find_profile(profile_name)
    profile = _read(profile_path)
    if "module" not in recipe.get("method", {}):
        raise UserError(f"{recipe_path}: method.module is missing; name the module that holds the method.")
    base = OmegaConf.structured(Run)
    base.recipe = recipe_path.stem
    base.recipe_folder = str(recipe_path.parent)
    base.profile = profile_path.stem
    base.method = _method_settings(recipe, profile, recipe_path)
    try:
        merged = OmegaConf.merge(
            base,
            {k: v for k, v in profile.items() if k != METHOD_OF_PROFILE},
            {k: v for k, v in recipe.items() if k != "method"},
        )
    except OmegaConfBaseException as error:
        raise UserError(f"{recipe_path.name} or {profile_path.name}: {_first_line(error)}") from error
    assert isinstance(merged, DictConfig)
    return _apply(merged, [w for w in words if not w.startswith("profile=")])


def _method_settings(recipe: dict[str, Any], profile: dict[str, Any], recipe_path: Path) -> dict[str, Any]:
    chosen = dict(recipe["method"])
    defaults = default_settings(str(chosen["module"]), recipe_path.parent)
    unknown = sorted(set(chosen) - {"module"} - set(defaults))
    if unknown:
        raise UserError(
            f"{recipe_path}: method has no key '{unknown[0]}'; known are {', '.join(sorted(defaults))}."
        )
    of_profile = {k: v for k, v in profile.get(METHOD_OF_PROFILE, {}).items() if k in defaults}
    return {"module": chosen.pop("module"), **defaults, **of_profile, **chosen}


def _apply(merged: DictConfig, words: list[str]) -> DictConfig:
    for word in words:
        if "=" not in word:
            raise UserError(
                f"'{word}' is not a setting; write key=value, e.g. seed=1 (--help lists the keys)."
            )
    # Keys of verl's tree are checked against that tree later; here any of them may come in.
    words = [f"++{word}" if word.startswith("verl.") else word for word in words]
    OmegaConf.set_struct(merged.method, True)
    ConfigStore.instance().store(name="vopd_run", node=merged)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base=None, config_dir=str(RECIPES)):
            config = compose("vopd_run", overrides=words)
        OmegaConf.resolve(config)
        missing = sorted(OmegaConf.missing_keys(config))
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        raise UserError(f"Setting not understood: {_first_line(cause)}") from error
    if missing:
        raise UserError(f"The setting '{missing[0]}' has no value; give {missing[0]}=... or another profile.")
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, OSError) as error:
        raise UserError(f"{path}: not readable as YAML ({_first_line(error)}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a mapping of keys is expected.")
    return content  # type: ignore[return-value]


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
