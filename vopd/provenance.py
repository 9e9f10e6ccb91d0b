"""What a result came from: code version, hashes of data, model and settings, versions of the libraries."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("verl", "torch", "transformers", "vllm", "ray", "datasets")


def hash_files(files: Iterable[Path]) -> str:
    """sha256 over names and contents, in the order of names."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


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
    readers = (root / "vopd" / "report", root / "vopd" / "compare.py")
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


def _git(root: Path, *words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()
