"""A run's checkpoints as folders: written aside, sealed with checksums, given their name, and looked at before use.

`checkpoints/global_step_12/` holds what continues a run after update 12 (docs/resuming.md lists its files). It has that
name only when it is whole: everything is written to a folder beside it, `manifest.json` gets the size and sha256 of
every file, it is synced to disk, and a rename makes it valid. An older checkpoint is removed after that, never
before. So a kill at any moment leaves the last whole one, and damage of any kind is seen by its checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vopd.common import files
from vopd.errors import UserError

SEAL = "manifest.json"
BLOCK_BYTES = 1 << 22
THREADS = 8  # of hashing, which lets go of the interpreter
_NAME = re.compile(r"global_step_(\d+)")
_UNFINISHED = ("writing_", "removing_")


@dataclass(frozen=True)
class Checkpoint:
    """A sealed checkpoint: the update after which it was written, and its folder."""

    step: int
    folder: Path


def place(folder: Path, step: int) -> Path:
    """Path of an update's checkpoint below the folder of all."""
    return folder / f"global_step_{step}"


def found(folder: Path) -> list[Checkpoint]:
    """Everything under `folder` that has a checkpoint's name, newest first, whole or not."""
    names = ((match, path) for path in folder.glob("global_step_*") if (match := _NAME.fullmatch(path.name)))
    return sorted((Checkpoint(int(m[1]), path) for m, path in names), key=lambda c: -c.step)


@contextmanager
def writing(folder: Path, step: int) -> Iterator[Path]:
    """An empty folder to write a checkpoint into; it becomes `place(folder, step)` if the block ends without error.

    Raises:
        OSError: the disk is full or read-only; the checkpoints that were there are as before.
    """
    aside, target = folder / f"writing_{step}", place(folder, step)
    remove_unfinished(folder)
    aside.mkdir(parents=True)
    try:
        yield aside
        _seal(aside, step)
        if target.exists():  # the same update written again, after the newer ones were found damaged
            _remove(target)
        aside.rename(target)
        files.sync_folder(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # half a checkpoint; frees its space
        raise


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and damaged ones, which the newest replaces."""
    for checkpoint in found(folder)[keep:]:
        _remove(checkpoint.folder)
    for damaged in folder.glob("damaged_step_*"):
        shutil.rmtree(damaged, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Take away what a kill left of a checkpoint that was being written or removed."""
    for path in folder.glob("*"):
        if path.name.startswith(_UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)


def problem(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint, or None: every file is there and is, by size and checksum, as it was written."""
    try:
        sealed = json.loads((checkpoint.folder / SEAL).read_text(encoding="utf-8"))["files"]
        entries = [(str(name), int(size), str(digest)) for name, (size, digest) in sealed.items()]
    except FileNotFoundError:
        return f"{SEAL} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{SEAL} cannot be read"
    for name, size, _ in entries:
        file = checkpoint.folder / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    digests = _digests([checkpoint.folder / name for name, _, _ in entries], flush=False)
    changed = [name for (name, _, wanted), found in zip(entries, digests, strict=True) if found != wanted]
    return f"{changed[0]} has changed (its checksum differs)" if changed else None


def newest_whole(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a sentence for each newer one that is not.

    Those that are not are renamed `damaged_step_N`.

    Raises:
        UserError: there are checkpoints and none is whole: to train from the start again is the user's decision.
    """
    remove_unfinished(folder)
    said: list[str] = []
    for checkpoint in found(folder):
        wrong = problem(checkpoint)
        if wrong is None:
            return checkpoint, said
        said.append(f"the checkpoint of update {checkpoint.step} is damaged: {wrong}")
        checkpoint.folder.rename(_free(folder / f"damaged_step_{checkpoint.step}"))
    damaged = sorted(path.name for path in folder.glob("damaged_step_*"))
    if damaged:
        why = f" ({said[-1]})" if said else ""
        raise UserError(
            f"{folder}: no checkpoint is whole{why}; remove the run folder to train from the start, or bring back "
            f"the files of {damaged[-1]} and rename it global_step_N."
        )
    return None, said


def _seal(folder: Path, step: int) -> None:
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = _digests(written, flush=True)
    entries = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, digest]
        for path, digest in zip(written, digests, strict=True)
    }
    for path in {file.parent for file in written} - {folder}:
        files.sync_folder(path)
    files.write_text(folder / SEAL, json.dumps({"step": step, "files": entries}, indent=1), sync=True)


def _digests(files: list[Path], flush: bool) -> list[str]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(partial(_digest, flush=flush), files))


def _digest(file: Path, flush: bool) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
        if flush:
            os.fsync(stream.fileno())
    return digest.hexdigest()


def _remove(folder: Path) -> None:
    """A kill inside the removal must not leave half a checkpoint under a valid name."""
    aside = folder.with_name(f"removing_{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def _free(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number, candidate = number + 1, path.with_name(f"{path.name}-{number}")
    return candidate
