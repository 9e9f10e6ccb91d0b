"""The server that an evaluation starts: its options, its end, and the cause where it does not start. No vLLM here."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from vopd.common.paths import ROOT
from vopd.errors import UserError
from vopd.evaluation import server

BASE = str(ROOT / "data" / "miniature" / "base")
ANSWERS = """
import os, socket, subprocess, sys
path = next(word for word in sys.argv if word.startswith("--uds=")).removeprefix("--uds=")
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)  # an engine
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
print("started", flush=True)
while True:
    connection, _ = listener.accept()
    if b"/die" in connection.recv(4096):
        print("(EngineCore pid=7) ERROR 11-28 12:00:00 [core.py:1] Traceback (most recent call last):", flush=True)
        print("(EngineCore pid=7) ERROR 11-28 12:00:00 [core.py:1] ValueError: no room for the cache", flush=True)
        sys.exit(1)
    connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n")
    connection.close()
"""
REFUSES = "print('vllm serve: error: argument --dtype: invalid choice: no'); raise SystemExit(2)"


def started_with(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(server, "COMMAND", ("-c", code))


def left(folder: Path) -> list[int]:
    """Processes that were started with a server's folder as theirs."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.environ().get("VOPD_SCRATCH") == str(folder)
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_options_are_written_for_a_command_line() -> None:
    assert server.flags({"a_b": 3, "on": True, "off": False, "none": None, "map": {"image": 1}, "text": "x"}) == [
        "--a-b=3", "--on", "--no-off", '--map={"image": 1}', "--text=x",
    ]  # fmt: skip
    cpu, gpu = (server.settings(device, 8, 1) for device in ("cpu", "cuda"))
    assert cpu["worker_extension_cls"] == "vopd.backbone.cpu.patches.ServingWorker"
    assert gpu["worker_extension_cls"] == "vopd.common.loopback.Worker" and "dtype" not in gpu


def test_it_is_there_within_the_block_and_nothing_of_it_after(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started_with(monkeypatch, ANSWERS)
    with server.started(BASE, 8, 1, {}, tmp_path / "log.txt") as socket:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket))) as client:
            assert client.get("http://vllm/health").is_success
        assert len(left(socket.parent)) == 2
    assert left(socket.parent) == [] and not socket.parent.exists()
    assert "started" in (tmp_path / "log.txt").read_text()


def test_the_cause_is_told_where_it_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started_with(monkeypatch, REFUSES)
    with (
        pytest.raises(UserError, match=r"argument --dtype: invalid choice.*log\.txt"),
        server.started(BASE, 8, 1, {}, tmp_path / "log.txt"),
    ):
        raise AssertionError("it did not start")


def test_the_cause_is_told_where_it_dies_while_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started_with(monkeypatch, ANSWERS)

    def ask() -> None:
        with (
            server.started(BASE, 8, 1, {}, tmp_path / "log.txt") as socket,
            httpx.Client(transport=httpx.HTTPTransport(uds=str(socket))) as client,
        ):
            with contextlib.suppress(httpx.HTTPError):
                client.get("http://vllm/die")
            time.sleep(0.5)
            client.get("http://vllm/health")

    with pytest.raises(UserError, match="ValueError: no room for the cache"):
        ask()


def test_nothing_is_left_when_the_evaluation_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\nfrom vopd.evaluation import server\n"
        f"server.COMMAND = ('-c', {ANSWERS!r})\n"
        f"with server.started({BASE!r}, 8, 1, {{}}, pathlib.Path(sys.argv[1])) as socket:\n"
        "    print(socket.parent, flush=True)\n    time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log.txt")],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout
    folder = Path(process.stdout.readline().strip())
    assert len(left(folder)) == 2
    process.kill()
    process.communicate()
    end = time.monotonic() + 30
    while left(folder) and time.monotonic() < end:
        time.sleep(0.1)
    assert left(folder) == []


def test_a_model_that_is_none_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for model in (str(tmp_path), "no/such-model"):
        with pytest.raises(UserError), server.started(model, 8, 1, {}, tmp_path / "log.txt"):
            raise AssertionError("it did not start")
