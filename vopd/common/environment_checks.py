"""What a run needs of the machine and of the environment it is started in, judged before anything starts.

Three answers are possible: a `UserError` where it cannot work, a change of the environment where that is safe and
better than a refusal (local traffic bypasses proxies; a home that cannot be written is replaced), and a note where
something is taken as it is but ought to be known. Checks take what they judge; `prepare_run` and `prepare_engine`
take it from the machine.
"""

from __future__ import annotations

import os
import pwd
import resource
import shutil
import tempfile
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from omegaconf import DictConfig, OmegaConf

from vopd.common import temporary
from vopd.common.paths import ROOT
from vopd.errors import UserError

MIB, GIB = 2**20, 2**30
# Room without which a run cannot be expected to end; guesses, not measured: logs of Ray's session and torch's compile
# caches, and prepared data with the base model's answers.
TEMP_BYTES = 200 * MIB
CACHE_BYTES = 200 * MIB
# Measured on the miniature (one rank): no process has more than 110 files open, and the 27 processes have 540 threads.
# What one more rank brings is a guess. Ray raises the soft limit of open files by itself, never the hard one.
OPEN_FILES = 256
THREADS = 700
THREADS_PER_RANK = 64
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
SOCKS = ("socks5", "socks5h")
PROXY_SCHEMES = ("http", "https", *SOCKS)
STEERING = ("RAY_", "VLLM_", "VERL_")
"""Prefixes of variables that change what the libraries do, silently."""
HOME_CACHES = {"HF_HOME": ".cache/huggingface"}
"""Found below the home by default, and worth reading from a home that cannot be written."""


# ---- devices -------------------------------------------------------------------------------------------------------


def check_devices(needed: int, visible: str | None, count: int) -> None:
    """Refuse a run on GPUs that this process cannot see.

    Args:
        needed: `hardware.devices_per_node`.
        visible: CUDA_VISIBLE_DEVICES, None where it is not set.
        count: GPUs that torch finds.
    """
    listed = None if visible is None else len([entry for entry in visible.split(",") if entry.strip()])
    if count >= needed and (listed is None or listed >= needed):
        return
    if listed is not None:
        shown = min(listed, count) or "none"
        why = f"CUDA_VISIBLE_DEVICES='{visible}' shows {shown}; set it to {needed} of this machine's"
    elif count:
        why = f"this machine has {count}; give hardware.devices_per_node={count}"
    else:
        why = (
            "none is found: no NVIDIA driver answers, or the packages are those for CPUs (scripts/setup.sh takes "
            "those for GPUs where `nvidia-smi -L` lists one); give profile=miniature for a run on the CPU"
        )
    raise UserError(f"hardware.device=cuda needs {needed} GPU{'s' * (needed > 1)}, and {why}.")


def cuda_devices() -> int:
    """GPUs that torch finds; no context is made on them."""
    import torch

    return torch.cuda.device_count()


# ---- folders -------------------------------------------------------------------------------------------------------


def check_temporary(given: str | None, name: str = "TMPDIR") -> None:
    """Refuse a folder for temporary files that cannot be written, or is too long for the sockets made in it.

    Python takes another folder in silence where the named one is missing; torch's own code does not.
    """
    if given is None or given == "":
        return
    folder = Path(given)
    if not folder.is_dir():
        raise UserError(f"{name}={given}: no such folder; make it, or unset {name}.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{name}={given}: not writable; give another folder, or unset {name}.")
    most = temporary.LONGEST_ROOT
    if len(os.fsencode(folder.absolute())) > most:
        raise UserError(
            f"{name}={given}: too long for the sockets that Ray makes in it (at most {most} bytes); give a "
            f"shorter folder, or unset {name}."
        )


def check_writable(folder: Path, what: str) -> None:
    """Refuse a folder, or the nearest one above it that is there, in which nothing can be made."""
    if not os.access(existing(folder), os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written, and {what} goes there; make it writable.")


def check_room(folder: Path, needed: int, what: str) -> None:
    """Refuse where the file system of `folder` (there or not yet) has less than `needed` bytes, or no inode, free."""
    place = existing(folder)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{folder}: {free / MIB:,.0f} MiB free, and {what} needs {needed / MIB:,.0f} MiB; make room there."
        )
    inodes = os.statvfs(place)
    if inodes.f_files and not inodes.f_favail:
        raise UserError(f"{folder}: no file can be made there (no free inodes); remove some files.")


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())


def replace_home(variables: MutableMapping[str, str], account: str | None, place: Path) -> str | None:
    """Where the home cannot be written, let the libraries have `place`/home; what it holds can still be read.

    vLLM, Hugging Face, Triton, matplotlib and flashinfer make folders below the home, and some of them fail without.

    Args:
        variables: the environment, which is changed.
        account: the home in the list of users, for where HOME is not set; None for a user who is not in it.
        place: a folder that can be written.

    Returns:
        A note, or None where the home is fine.

    Raises:
        UserError: neither can be written.
    """
    home = variables.get("HOME") or account
    if home and Path(home).is_dir() and os.access(home, os.W_OK | os.X_OK):
        return None
    instead = place / "home"
    try:
        instead.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"HOME={home or ''} cannot be written, and neither can {instead} ({error.strerror}); set HOME to a folder "
            "that can."
        ) from error
    for name, below in HOME_CACHES.items():
        if home and (Path(home) / below).is_dir():
            variables.setdefault(name, str(Path(home) / below))
    variables["HOME"] = str(instead)
    return f"HOME={home or ''} cannot be written: the libraries' caches go to {instead}"


def name_user(variables: MutableMapping[str, str], listed: bool) -> None:
    """A user who is not in the list of users (a container's arbitrary id) gets a name: torch asks for one."""
    if not listed and not any(variables.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        variables["USER"] = "user"


def account_home() -> str | None:
    """The home that the list of users states for this one, None for one who is not in it."""
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return None


# ---- limits --------------------------------------------------------------------------------------------------------


def check_shared_memory(free: int, buckets: int, store: int) -> str | None:
    """Refuse too small a /dev/shm; a note where Ray will go elsewhere.

    Args:
        free: bytes free in /dev/shm.
        buckets: bytes through which the weights go to vLLM, all ranks together; they have no other place.
        store: bytes of Ray's object store, which Ray puts on disk where they do not fit.
    """
    if free < buckets:
        raise UserError(
            f"/dev/shm: {free / MIB:,.0f} MiB free, and the run needs {buckets / MIB:,.0f} MiB; remove leftovers "
            "there, or make it larger (docker run --shm-size=1g)."
        )
    if free < buckets + store:
        return (
            f"/dev/shm has {free / MIB:,.0f} MiB free, less than the {(buckets + store) / MIB:,.0f} MiB wanted: Ray's "
            "objects go through the disk, which is slower (docker run --shm-size=1g)"
        )
    return None


def check_open_files(limit: int) -> None:
    """Refuse a hard limit of open files (ulimit -Hn; below 0 there is none) that a run would reach."""
    if 0 <= limit < OPEN_FILES:
        raise UserError(
            f"ulimit -n: at most {limit} open files, and {OPEN_FILES} are needed; raise the limit."
        )


def check_threads(limit: int, running: int, ranks: int, privileged: bool) -> None:
    """Refuse a limit of processes and threads (ulimit -u) that leaves too few.

    Args:
        limit: the soft limit; below 0 there is none.
        running: threads that the user has already.
        ranks: of the trainer.
        privileged: whether the system lets this user go beyond the limit (root).
    """
    needed = THREADS + THREADS_PER_RANK * ranks
    if not privileged and 0 <= limit < running + needed:
        raise UserError(
            f"ulimit -u: {limit} processes and threads, {running} of them in use, and the run needs {needed} more; "
            "raise the limit."
        )


def user_threads() -> int:
    """Threads of all processes of this user, which is what `ulimit -u` counts."""
    import psutil

    mine, total = os.getuid(), 0
    for process in psutil.process_iter(["uids", "num_threads"]):
        if process.info["uids"] and process.info["uids"].real == mine:
            total += process.info["num_threads"] or 0
    return total


# ---- network -------------------------------------------------------------------------------------------------------


def bypass_proxies(variables: MutableMapping[str, str]) -> None:
    """Let traffic to this machine go straight; both spellings, since libraries read one or the other."""
    given = variables.get("no_proxy") or variables.get("NO_PROXY") or ""
    hosts = [host.strip() for host in given.split(",") if host.strip()]
    if "*" in hosts or not any(_proxy(variables, name) for name in PROXIES):
        return
    both = ",".join([*hosts, *(host for host in LOOPBACK if host not in hosts)])
    variables["no_proxy"] = variables["NO_PROXY"] = both


def check_proxies(variables: Mapping[str, str], has_socks: bool) -> None:
    """Refuse proxies that the HTTP client cannot use: it would fail at its first request, or for a local one too.

    Args:
        variables: the environment.
        has_socks: whether the package socksio is there.
    """
    for name in PROXIES:
        spelled, value = _proxy(variables, name) or ("", "")
        if not value:
            continue
        try:
            parts = urlsplit(value if "://" in value else f"http://{value}")
            scheme, host, _ = parts.scheme, parts.hostname, parts.port
        except ValueError:
            scheme, host = "", None
        if scheme not in PROXY_SCHEMES or not host:
            # The value may hold a password: it is not repeated.
            raise UserError(
                f"{spelled} names no proxy that can be used; write http://host:port (or https, socks5), or unset it."
            )
        if scheme in SOCKS and not has_socks:
            raise UserError(
                f"{spelled} names a SOCKS proxy, for which the package socksio is missing; install it into .venv, "
                f"or unset {spelled}."
            )


def _proxy(variables: Mapping[str, str], name: str) -> tuple[str, str] | None:
    """The variable as it is spelled, and its value; lower case goes first, as in the libraries."""
    return next(
        ((spelled, variables[spelled]) for spelled in (name, name.upper()) if variables.get(spelled)), None
    )


def has_socks() -> bool:
    """Whether httpx can use a SOCKS proxy."""
    return find_spec("socksio") is not None


def own_ray(variables: MutableMapping[str, str], nodes: int) -> str | None:
    """A run on one machine has a Ray of its own, whatever cluster RAY_ADDRESS names; a note where it names one.

    Raises:
        UserError: several nodes without a cluster.
    """
    address = variables.get("RAY_ADDRESS")
    if nodes > 1:
        if not address:
            raise UserError(
                f"hardware.nodes={nodes} needs a Ray cluster over them; start one and set RAY_ADDRESS to its address."
            )
        return None
    if address is None:
        return None
    del variables["RAY_ADDRESS"]
    return f"RAY_ADDRESS={address} is not used: a run on one machine has a Ray of its own"


def steering_note(variables: Mapping[str, str], ours: Mapping[str, str]) -> str | None:
    """A note that names the variables that change what the libraries do; values stay out, they may be secrets."""
    names = sorted(name for name in variables if name.startswith(STEERING) and name not in ours)
    if not names:
        return None
    return (
        f"the environment sets {', '.join(names)}: the libraries follow {'them' if len(names) > 1 else 'it'}"
    )


# ---- everything together -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What the checks judge, as it is here."""

    shared_memory_free: int
    open_files: int
    threads: int
    thread_limit: int
    privileged: bool
    devices: int
    account: str | None


def machine(device: str) -> Machine:
    """This machine, as this process sees it."""
    shared, privileged = Path("/dev/shm"), os.geteuid() == 0
    return Machine(
        shared_memory_free=shutil.disk_usage(shared).free if shared.is_dir() else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        threads=0 if privileged else user_threads(),
        thread_limit=resource.getrlimit(resource.RLIMIT_NPROC)[0],
        privileged=privileged,
        devices=cuda_devices() if device == "cuda" else 0,
        account=account_home(),
    )


def prepare_run(
    config: DictConfig,
    variables: MutableMapping[str, str],
    ours: Mapping[str, str],
    cache: Path,
    here: Machine,
) -> list[str]:
    """All checks of a training run, and the changes of its environment.

    Args:
        config: the run's settings.
        variables: the environment, which is changed.
        ours: the variables that the run sets in any case.
        cache: folder for what can be made again.
        here: what the machine has.

    Returns:
        Notes for the terminal.

    Raises:
        UserError: it cannot work; names what, and what to do.
    """
    hardware = config.hardware
    if hardware.device == "cuda" and hardware.nodes == 1:
        check_devices(hardware.devices_per_node, variables.get("CUDA_VISIBLE_DEVICES"), here.devices)
    buckets, store = shared_memory_needs(config)
    notes = [
        own_ray(variables, hardware.nodes),
        check_shared_memory(here.shared_memory_free, buckets, store),
        *_prepare(variables, cache, here),
    ]
    check_threads(here.thread_limit, here.threads, hardware.devices_per_node, here.privileged)
    check_room(cache, CACHE_BYTES, "the cache")
    if hardware.device != "cpu":  # a run on CPUs works offline
        check_proxies(variables, has_socks())
    notes.append(steering_note(variables, ours))
    return [note for note in notes if note]


def prepare_engine(variables: MutableMapping[str, str], cache: Path, here: Machine) -> list[str]:
    """What vLLM's engine in this process needs: as `prepare_run`, without what Ray needs."""
    return [note for note in _prepare(variables, cache, here) if note]


def _prepare(variables: MutableMapping[str, str], cache: Path, here: Machine) -> list[str | None]:
    for name in ("TMPDIR", "TEMP", "TMP"):
        check_temporary(variables.get(name), name)
    temporary = Path(tempfile.gettempdir())
    check_writable(temporary, "what Ray and vLLM make for a while")
    check_room(temporary, TEMP_BYTES, "what Ray and vLLM make for a while")
    check_open_files(here.open_files)
    bypass_proxies(variables)
    name_user(variables, here.account is not None)
    return [replace_home(variables, here.account, cache)]


def shared_memory_needs(config: DictConfig) -> tuple[int, int]:
    """Bytes in /dev/shm: the buckets of the weight sync, and Ray's object store where its size is set (on CPUs)."""
    files = [
        ROOT / "vopd" / "backbone" / name for name in ("verl.yaml", f"verl_{config.hardware.device}.yaml")
    ]
    tree = OmegaConf.merge(*(OmegaConf.load(file) for file in files), config.verl)
    bucket: Any = OmegaConf.select(
        tree, "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"
    )
    store: Any = OmegaConf.select(tree, "ray_kwargs.ray_init.object_store_memory")
    # On GPUs the bucket is the device's own memory.
    megabytes = bucket if isinstance(bucket, int) and config.hardware.device == "cpu" else 0
    buckets = megabytes * MIB * config.hardware.devices_per_node
    return buckets, store if isinstance(store, int) else 0


def check_disk(folder: Path, needed_gb: float) -> None:
    """Refuse when the file system that holds (or will hold) `folder` has less than `needed_gb` (1e9 bytes)."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free_gb = shutil.disk_usage(existing).free / 1e9
    if free_gb < needed_gb:
        raise UserError(
            f"{folder}: {free_gb:.1f} GB free, the run needs {needed_gb:g} GB; "
            "make room or choose another folder."
        )


def available_memory_gib(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Memory that a new process may take, in GiB: the machine's, or the container's (cgroup v2) if less."""
    available = psutil.virtual_memory().available
    limit = cgroup / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        # Cached file pages count as used but are given back on demand.
        used = int((cgroup / "memory.current").read_text()) - int(stat["inactive_file"])
        available = min(available, int(most) - used)
    return available / GIB


def check_memory(needed_gib: float, profile: str) -> None:
    """Refuse when less than `needed_gib` (2**30 bytes) of memory is available to this process."""
    available = available_memory_gib()
    if available < needed_gib:
        raise UserError(
            f"profile {profile}: needs {needed_gib:g} GiB of memory, {available:.1f} GiB are available; "
            "stop other programs or choose a smaller profile."
        )
