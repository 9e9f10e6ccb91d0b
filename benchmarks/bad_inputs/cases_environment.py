"""Environments in which a run cannot work."""

from pathlib import Path

from benchmarks.bad_inputs import Case


def arguments(folder: Path) -> list[str]:
    """A run that asks little of the machine."""
    return ["vision_opd", f"run_dir={folder / 'run'}", "hardware.memory_gib=0", "hardware.disk_gib=0"]


def on_gpus(folder: Path) -> list[str]:
    """The same on two GPUs."""
    return [*arguments(folder), "hardware.device=cuda", "hardware.devices_per_node=2"]


def on_machines(folder: Path) -> list[str]:
    """The same on two machines."""
    return [*arguments(folder), "hardware.device=cuda", "hardware.nodes=2"]


def long_folder(folder: Path) -> str:
    """A folder whose path is too long for a socket in it."""
    long = folder / ("t" * 100)
    long.mkdir()
    return str(long)


def file_in_place(folder: Path) -> str:
    """A file where a folder should be."""
    (folder / "file").touch()
    return str(folder / "file")


CASES = (
    Case(
        "no GPU shown", "vopd.runner.run", on_gpus, "CUDA_VISIBLE_DEVICES='' shows none",
        environment={"CUDA_VISIBLE_DEVICES": ""},
    ),
    Case(
        "fewer GPUs shown than asked for", "vopd.runner.run", on_gpus,
        "needs 2 GPUs, and CUDA_VISIBLE_DEVICES='0' shows",
        environment={"CUDA_VISIBLE_DEVICES": "0"},
    ),
    Case(
        "several machines without a cluster", "vopd.runner.run", on_machines, "hardware.nodes=2 needs a Ray cluster",
        environment={"RAY_ADDRESS": ""},
    ),
    Case(
        "a temporary folder too long for sockets", "vopd.runner.run", arguments, "too long for the sockets",
        environment={"TMPDIR": long_folder},
    ),
    Case(
        "a temporary folder that is missing", "vopd.runner.run", arguments, "no such folder; make it, or unset TMPDIR",
        environment={"TMPDIR": lambda folder: str(folder / "gone")},
    ),
    Case(
        "a file as the temporary folder", "vopd.runner.run", arguments, "no such folder; make it, or unset TMPDIR",
        environment={"TMPDIR": file_in_place},
    ),
)  # fmt: skip
