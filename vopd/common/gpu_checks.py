"""What a run on GPUs needs beside their number: memory, a driver, a compiler, judged before anything starts.

Checks take what they judge; `gpus`, `torch_cuda`, `compiler` and `python_header` look at the machine.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vopd.errors import UserError

MIB, GIB = 2**20, 2**30
QUERY = (
    "nvidia-smi",
    "--query-gpu=name,memory.total,memory.used,driver_version",
    "--format=csv,noheader,nounits",
)
LEAST_DRIVER = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}
"""Oldest Linux driver for any minor version of a major CUDA (NVIDIA, CUDA Compatibility)."""
COMPILERS = ("cc", "gcc", "clang")


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi shows it; bytes."""

    name: str
    memory: int
    used: int
    driver: str


def gpus(visible: str | None) -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves (numbers alone are understood); none where nvidia-smi is missing."""
    if not shutil.which(QUERY[0]):
        return []
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return chosen(parse(answer), visible)


def parse(answer: str) -> list[Gpu]:
    """What nvidia-smi printed, a line a GPU; a line with a figure that is not available is left out."""
    found = []
    for line in answer.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 4 and cells[1].isdigit() and cells[2].isdigit():
            found.append(Gpu(cells[0], int(cells[1]) * MIB, int(cells[2]) * MIB, cells[3]))
    return found


def chosen(found: list[Gpu], visible: str | None) -> list[Gpu]:
    """Those with the numbers in CUDA_VISIBLE_DEVICES; all where it is not set or holds other names."""
    entries = [entry.strip() for entry in (visible or "").split(",") if entry.strip()]
    if not entries or not all(entry.isdigit() and int(entry) < len(found) for entry in entries):
        return found
    return [found[int(entry)] for entry in entries]


def torch_cuda() -> str | None:
    """The CUDA that the installed torch was built for, such as 13.0; None for a build for CPUs."""
    import torch

    return torch.version.cuda


def compiler(variables: Mapping[str, str]) -> str | None:
    """The C compiler that Triton would call: CC, or the first of the usual names."""
    names = (variables["CC"],) if variables.get("CC") else COMPILERS
    return next((path for name in names if (path := shutil.which(name))), None)


def python_header() -> Path:
    """Where Python.h of this interpreter belongs."""
    return Path(sysconfig.get_paths()["include"]) / "Python.h"


def check_driver(found: Sequence[Gpu], cuda: str | None) -> None:
    """Refuse a driver that is too old for the CUDA of the installed torch."""
    least = LEAST_DRIVER.get(int(cuda.split(".")[0])) if cuda else None
    for gpu in found:
        numbers = tuple(int(part) for part in re.findall(r"\d+", gpu.driver))
        if least and numbers and numbers < least:
            raise UserError(
                f"the NVIDIA driver {gpu.driver} is too old: torch was built for CUDA {cuda}, which needs "
                f"{'.'.join(map(str, least))} or newer; update the driver."
            )


def check_memory(
    found: Sequence[Gpu], resident: float, update: float, rollout: float, memory_share: float
) -> None:
    """Refuse GPUs that are too small for the estimate, or mostly in use.

    Args:
        found: the run's GPUs.
        resident: bytes that the trainer always holds on each.
        update: bytes at the peak of an update, `resident` included.
        rollout: least bytes of vLLM while it is awake.
        memory_share: `rollout.memory_share`, the share of a GPU's memory that vLLM takes.
    """
    for number, gpu in enumerate(found):
        free, share = gpu.memory - gpu.used, memory_share * gpu.memory
        name = f"GPU {number} ({gpu.name}, {gpu.memory / GIB:.0f} GiB, {gpu.used / GIB:.1f} in use)"
        if free < update:
            raise UserError(
                f"{name}: an update is estimated to need {update / GIB:.1f} GiB; give a smaller "
                "train.max_tokens_per_micro_batch or train.chunk, train.gradient_checkpointing=true, more GPUs, or a "
                "smaller model."
            )
        if free < resident + share:
            raise UserError(
                f"{name}: the trainer's weights and momenta take {resident / GIB:.1f} GiB and vLLM "
                f"rollout.memory_share={memory_share:g}, {share / GIB:.1f} GiB; give a smaller rollout.memory_share."
            )
        if share < rollout:
            raise UserError(
                f"{name}: vLLM is given {share / GIB:.1f} GiB (rollout.memory_share={memory_share:g}) and needs "
                f"{rollout / GIB:.1f} GiB at least; give a larger rollout.memory_share or rollout.tensor_parallel."
            )


def check_compiler(found: str | None, header: Path) -> None:
    """Refuse a machine on which Triton cannot compile the launchers of its kernels."""
    if found is None:
        raise UserError(
            "no C compiler is found (cc, gcc, clang, or the variable CC), and Triton compiles a launcher for each "
            "kernel; install gcc."
        )
    if not header.is_file():
        raise UserError(
            f"{header}: missing, and Triton compiles a launcher for each kernel against it; install the headers of "
            "this Python (such as the package python3-dev), or take a Python that brings them."
        )


def visible_devices() -> str | None:
    """CUDA_VISIBLE_DEVICES of this process."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")
