"""Where a run listens; that a whole run keeps to it is seen end to end (tests/end_to_end/test_vision_opd.py)."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vopd.common import loopback
from vopd.config import ROOT

GROUP = """
import os, psutil, torch.distributed as dist
from vopd.common import loopback
class Worker(loopback.Worker):
    pass
worker = Worker()
worker.distributed_init_method = "tcp://192.0.2.7:45678"
for method in (worker.distributed_init_method, os.environ[loopback.RENDEZVOUS]):
    dist.init_process_group("gloo", init_method=method, rank=0, world_size=1)
    dist.barrier()
    print({c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"} - {"127.0.0.1"})
    dist.destroy_process_group()
"""


def test_who_may_use_the_runs_ray_is_known_to_this_user_alone(tmp_path: Path) -> None:
    found = loopback.start(tmp_path)
    token = Path(found["RAY_AUTH_TOKEN_PATH"])
    assert token.parent == tmp_path and stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64 and token.read_text() not in found.values()
    (tmp_path / "other").mkdir()
    assert Path(loopback.start(tmp_path / "other")["RAY_AUTH_TOKEN_PATH"]).read_text() != token.read_text()


def test_processes_of_trainer_and_engine_meet_without_a_port_open_to_the_network(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROUP],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | loopback.start(tmp_path),
    )
    assert done.stdout.split() == ["set()", "set()"], done.stderr[-2000:]


def test_engines_meet_in_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loopback.RENDEZVOUS, loopback.start(tmp_path)[loopback.RENDEZVOUS])
    assert loopback.as_file("tcp://10.0.0.1:1234") == f"file://{tmp_path}/engine0:1234"
    monkeypatch.setenv("VERL_REPLICA_RANK", "3")
    assert loopback.as_file("tcp://[::1]:1234") == f"file://{tmp_path}/engine3:1234"
    assert loopback.as_file("env://") == "env://"
    monkeypatch.delenv(loopback.RENDEZVOUS)
    assert loopback.as_file("tcp://10.0.0.1:1234") == "tcp://10.0.0.1:1234"  # several machines


def test_ray_takes_the_loopback_for_its_address(tmp_path: Path) -> None:
    code = "import ray._private.services as s; print(s.get_node_ip_address(), s.resolve_ip_for_localhost('localhost'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | loopback.start(tmp_path),
    )
    assert done.stdout.split() == ["127.0.0.1", "127.0.0.1"], done.stderr[-2000:]
