"""What a result came from: code version, hashes of data, model and settings, versions of the libraries."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vopd.common import caches

LIBRARIES = (
    "verl", "torch", "transformers", "vllm", "ray", "datasets",
    "TransferQueue", "numpy", "pillow", "pyarrow", "safetensors", "tensordict", "tokenizers", "torchvision",
)  # fmt: skip
MODEL_SUFFIXES = (".json", ".safetensors", ".jinja", ".txt", ".model", ".tiktoken")
REMEMBERED_BYTES = 4 << 20
"""From this size on the hash of files is remembered under their state (see `_remembered`)."""
SETTLED_SECONDS = 2.0


def hash_files(files: Iterable[Path]) -> str:
    """sha256 over names and contents, in the order of names; what is large and unchanged is not read again."""
    ordered = sorted(files)
    return _remembered("named", ordered, lambda: _sha256(ordered, names=True))


def hash_contents(files: Iterable[Path]) -> str:
    """sha256 over the contents of the files one after the other; what is large and unchanged is not read again."""
    ordered = list(files)
    return _remembered("contents", ordered, lambda: _sha256(ordered, names=False))


def model_files(folder: Path) -> list[Path]:
    """What is read of a model folder: weights, configuration, tokenizer, processor, template."""
    return sorted(f for f in folder.iterdir() if f.suffix in MODEL_SUFFIXES and f.is_file())


def model_hash(model: str) -> str:
    """Hash of a model folder's files; of name and revision for a model on the hub, of the name where it is unknown."""
    folder = Path(model)
    if folder.is_dir():
        return hash_files(model_files(folder))
    return hash_json([model, revision] if (revision := _revision(model)) else model)


def _revision(model: str) -> str | None:
    """The commit of a model on the hub that is loaded now: its newest, or the newest that is here without a network."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json")).parent.name
    except (OSError, ValueError):  # no such model or no network: loading it reports that
        return None


def _sha256(files: Iterable[Path], names: bool) -> str:
    digest = hashlib.sha256()
    for file in files:
        if names:
            digest.update(file.name.encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _remembered(kind: str, files: Sequence[Path], hashed: Callable[[], str]) -> str:
    """The hash, from the cache if every file has the size, times and inode that it had when it was hashed.

    The time of change (ctime) is among them: unlike that of modification no tool sets it back, so an edit of the same
    size is noticed. A file that was changed within the clock's grain of being hashed is not remembered.
    """
    before = [_state(file) for file in files]
    if sum(state[1] for state in before) < REMEMBERED_BYTES:
        return hashed()
    key = hash_json([kind, before])
    if known := caches.read("hashes", key):
        return known.decode()
    value = hashed()
    settled = time.time_ns() - int(SETTLED_SECONDS * 1e9)
    if max(max(state[2:4]) for state in before) < settled and before == [_state(file) for file in files]:
        caches.store("hashes", key, value.encode())
    return value


def _state(file: Path) -> tuple[str, int, int, int, int, int]:
    s = file.stat()
    return str(file.absolute()), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev


def hash_json(value: Any) -> str:
    """sha256 of a JSON-able value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def code_version(root: Path) -> str:
    """Commit of the checkout, `+changes` if files differ from it; `unknown` outside a checkout."""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changed else "")


def code_hash(root: Path) -> str:
    """Hash of the code that a run executes: trainer, methods, data, evaluation. What only reads results is left out.

    Unlike the commit it is not moved by a change of documents or tests.
    """
    files = [f for folder in ("vopd", "baselines", "data") for f in (root / folder).rglob("*.py")]
    files += (root / "vopd" / "backbone").glob("*.yaml")
    readers = (root / "vopd" / "report", root / "vopd" / "runner" / "series.py")
    kept = [f for f in files if f not in readers and readers[0] not in f.parents]
    return hash_json({str(f.relative_to(root)): hash_files([f]) for f in kept})


def scorer(root: Path) -> dict[str, str]:
    """How a run's answers are judged: the rule, the judge behind it (none), and the hash of the parser's code."""
    code = hash_files((root / "vopd" / "evaluation" / "scoring").glob("*.py"))
    return {"rule": "strict", "judge": "none", "code": code}


def library_versions() -> dict[str, str]:
    """Installed versions of what decides a result."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def machine(device: str) -> str:
    """The kind of machine, for figures in seconds: processor and cores, and the cards where `device` is cuda."""
    facts: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else ():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.machine()
    if "model" in facts:  # clouds hide the name; family and model still tell generations apart
        name += f" (family {facts.get('cpu family')}, model {facts['model']})"
    found = f"{name}, {len(os.sched_getaffinity(0))} cores"
    if device == "cuda":
        import torch

        cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found += ", " + " + ".join(f"{n} x {card}" for card, n in Counter(cards).items())
    return found


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()
