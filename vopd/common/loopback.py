"""Where the processes of a run on one machine listen: at the loopback address alone.

Ray would listen at the machine's own address, and torch's rendezvous at every address, for whoever can reach the
machine; what they receive, they unpickle. Here Ray, vLLM and TransferQueue take the loopback for the machine's address,
and processes that form a group find each other through a file in the run's own folder (`scratch`) instead of a port.
Runs on several machines need their network and keep the libraries' own ways: use them in a network you trust.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

ADDRESS = "127.0.0.1"
TOKEN = "ray_token"
RENDEZVOUS = "DIST_INIT_METHOD"  # verl's name of the variable


def start(folder: Path) -> dict[str, str]:
    """Variables for the processes of a run on this machine alone, whose temporary folder is `folder`.

    Who knows the token in it may use the run's Ray; left to itself, Ray leaves one in the home folder.
    """
    token = os.open(folder / TOKEN, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(token, "w") as file:
        file.write(secrets.token_hex(32))
    return {
        # Ray's switch for systems whose firewalls ask: its address is the loopback.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Any free port, instead of the same two in every Ray.
        "AUTOSCALER_METRIC_PORT": "0",
        "DASHBOARD_METRIC_PORT": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / TOKEN),
        "VLLM_HOST_IP": ADDRESS,
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        RENDEZVOUS: f"file://{folder}/trainer",
    }


class Worker:
    """For vLLM's workers (`worker_extension_cls`): their rendezvous, too, is a file."""

    @property
    def distributed_init_method(self) -> str:
        """What vLLM hands to torch."""
        return self._rendezvous

    @distributed_init_method.setter
    def distributed_init_method(self, method: str) -> None:
        self._rendezvous = as_file(method)


def as_file(method: str) -> str:
    """vLLM's `tcp://HOST:PORT` as a file's address; what else it says, or on several machines, as it is.

    All workers of an engine are told the same port, and take what follows the last colon for the engine's name.
    """
    trainer = os.environ.get(RENDEZVOUS, "")
    if not (method.startswith("tcp://") and trainer.startswith("file://")):
        return method
    engine, port = os.environ.get("VERL_REPLICA_RANK", "0"), method.rsplit(":", 1)[1]
    return f"{trainer.rsplit('/', 1)[0]}/engine{engine}:{port}"
