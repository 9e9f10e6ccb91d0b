"""What a check of a run prints: what would run, what it would take by which formula, and what this machine has."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hydra.errors import InstantiationException
from omegaconf import DictConfig

from vopd.common import environment_checks, gpu_checks, library_environment
from vopd.common.failures import one_line
from vopd.errors import UserError
from vopd.method import Method
from vopd.runner.estimate import CARDS, GIB, Estimate, Figure, total

SECTIONS = {
    "parameters": "Parameters",
    "resident": "Per {device}: what stays",
    "update": "Per {device}: what an update adds",
    "rollout": "Per {device}: vLLM, {turns}",
    "host": "Main memory of a node",
    "disk": "Disk, in the run folder",
    "seconds": "Seconds of a step, at most",
}


def lines(config: DictConfig, method: Method, found: Estimate | str) -> list[str]:
    """All of it, line by line.

    Args:
        config: the run's settings, its paths absolute.
        method: what they name.
        found: the estimate, or why there is none.
    """
    return [*what_would_run(config, method), "", *estimated(config, found), "", *looked_at(config), ""]


def what_would_run(config: DictConfig, method: Method) -> Iterator[str]:
    """Model, ranks, rows and tokens, as sentences."""
    train, rollout, hardware = config.train, config.rollout, config.hardware
    ranks = hardware.nodes * hardware.devices_per_node
    rows = train.prompts * train.rollouts
    yield f"{config.recipe} on {config.profile}, seed {config.seed}: {config.model.path}, data {config.data.folder}"
    yield (
        f"{train.steps} steps of {train.prompts} prompts x {train.rollouts} = {rows} rows, "
        f"{train.updates_per_batch} update{'s' * (train.updates_per_batch > 1)} each, on {hardware.nodes} x "
        f"{hardware.devices_per_node} {device(config)} rank{'s' * (ranks > 1)}: {rows // ranks} rows a rank and step"
    )
    yield (
        f"prompts up to {rollout.max_prompt_tokens:,} tokens, responses up to {rollout.max_response_tokens:,}, "
        f"{train.max_tokens_per_micro_batch:,} tokens a micro-batch; views {', '.join(method.views)}; results in "
        f"{config.run_dir}"
    )


def estimated(config: DictConfig, found: Estimate | str) -> Iterator[str]:
    """The estimate as tables, or why there is none."""
    if isinstance(found, str):
        yield (
            f"No estimate: {found.rstrip('.')}; give model.path=FOLDER, where a folder that holds config.json alone is "
            "enough."
        )
        return
    cuda = config.hardware.device == "cuda"
    names = {
        "device": "GPU" if cuda else "rank",
        "turns": "while the trainer waits" if cuda else "a process beside the rank",
    }
    for key, title in SECTIONS.items():
        figures: tuple[Figure, ...] = getattr(found, key)
        if figures:
            yield title.format(**names)
            yield from _table(figures)
            yield ""
    yield from _sums(found, cuda)


def _table(figures: tuple[Figure, ...]) -> Iterator[str]:
    """Name, figure and formula in columns; the formula is last and may be long."""
    whole = Figure("together", total(figures), figures[0].unit, "")
    rows = [(figure.name, shown(figure), figure.formula) for figure in (*figures, whole)]
    name, value = (max(len(row[i]) for row in rows) for i in (0, 1))
    for row in rows:
        yield f"  {row[0]:<{name}}  {row[1]:>{value}}  {row[2]}".rstrip()


def shown(figure: Figure) -> str:
    """A figure with its unit."""
    if figure.unit == "B":
        return f"{figure.value / GIB:.2f} GiB"
    return f"{figure.value:,.1f} s" if figure.unit == "s" else f"{figure.value:,.0f}"


def _sums(found: Estimate, cuda: bool) -> Iterator[str]:
    if cuda:
        fits = [card.name for card in CARDS.values() if card.memory_gib * GIB >= found.device_bytes]
        yield (
            f"Per GPU: {found.update_bytes / GIB:.1f} GiB in an update; "
            f"{found.beside_rollout_bytes / GIB:.1f} GiB beside vLLM, which needs at least "
            f"{found.least_rollout.value / GIB:.1f} GiB. Cards with room for both: {', '.join(fits) or 'none'}."
        )
    yield f"Main memory: {found.host_bytes / GIB:.1f} GiB a node. Disk: {found.disk_bytes / 1e9:.1f} GB."


def looked_at(config: DictConfig) -> Iterator[str]:
    """What this machine has, line by line."""
    here = environment_checks.machine(config.hardware.device)
    yield "Looked at:"
    if config.hardware.device == "cuda":
        found = gpu_checks.gpus(gpu_checks.visible_devices())
        yield f"- GPUs: {here.devices} that torch finds; nvidia-smi shows {len(found) or 'none'}"
        for gpu in found:
            yield f"  {gpu.name}, {gpu.memory / GIB:.0f} GiB, {gpu.used / GIB:.1f} in use, driver {gpu.driver}"
        yield f"- torch for CUDA {gpu_checks.torch_cuda() or '(a build for CPUs)'}"
        header = gpu_checks.python_header()
        yield f"- C compiler: {gpu_checks.compiler(os.environ) or 'none'}; {header}: {_there(header)}"
    yield f"- main memory: {environment_checks.available_memory_gib():.1f} GiB available"
    yield f"- /dev/shm: {here.shared_memory_free / GIB:.1f} GiB free"
    free = shutil.disk_usage(environment_checks.existing(Path(config.run_dir))).free
    yield f"- disk of {config.run_dir}: {free / 1e9:.1f} GB free"


def _there(file: Path) -> str:
    return "there" if file.is_file() else "missing"


def device(config: DictConfig) -> str:
    """How a rank's device is called."""
    return "GPU" if config.hardware.device == "cuda" else "CPU"


def check_verl(run: DictConfig) -> None:
    """Compose verl's tree, and make its own dataclasses of it: they refuse what verl would refuse later.

    Raises:
        UserError: a `verl.` override that verl does not have, or a value that it does not take.
    """
    os.environ.update(library_environment.variables(run.hardware.device))
    from verl.utils.config import omega_conf_to_dataclass

    from vopd.backbone.verl_config import verl_config

    tree = verl_config(run).actor_rollout_ref
    for part in ("actor", "rollout"):
        try:
            omega_conf_to_dataclass(tree[part])
        except (InstantiationException, TypeError, ValueError, AssertionError) as error:
            raise UserError(f"verl refuses actor_rollout_ref.{part}: {one_line(str(error))}.") from error
