"""Trackers: found wanting before a run starts, and unable to end one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from vopd.backbone import tracking
from vopd.backbone.tracking import Trackers
from vopd.errors import UserError
from vopd.runner import trackers

WANDB = {"wandb": True, "tensorboard": False}


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes a connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def answering() -> Iterator[str]:
    """The address of a server that answers once, and with an error at that."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_nothing_is_asked_where_no_tracker_or_no_server_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "unreachable", lambda server: pytest.fail("asked"))
    trackers.check({"wandb": False, "tensorboard": True})
    for mode in trackers.ALONE:
        monkeypatch.setenv("WANDB_MODE", mode)
        trackers.check(WANDB)


def test_no_key_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"no key for https://api\.wandb\.ai.*WANDB_MODE=offline"):
        trackers.check(WANDB)


def test_a_server_out_of_reach_is_a_sentence(monkeypatch: pytest.MonkeyPatch, silent: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary123")
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    for address in (closed, "http://no.such.host.invalid", "no address"):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        with pytest.raises(UserError, match=r"does not answer.*WANDB_MODE=offline") as caught:
            trackers.check(WANDB)
        assert "canary123" not in str(caught.value)
    assert trackers.unreachable(silent, 0.1)


def test_a_key_in_netrc_and_a_server_that_answers_anything_will_do(
    monkeypatch: pytest.MonkeyPatch, answering: str, tmp_path: Any
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password canary123\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("WANDB_BASE_URL", answering)
    trackers.check(WANDB)


def test_a_package_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.PACKAGES, "tensorboard", "no_such_package")
    with pytest.raises(UserError, match=r"logging\.tensorboard=true: the package no_such_package"):
        trackers.check({"wandb": False, "tensorboard": True})


# ---- while a run is under way ---------------------------------------------------------------------------------------


class Backend:
    """verl's `Tracking` for one tracker; fails where its name says."""

    def __init__(self, project: str, experiment: str, names: list[str], config: Any) -> None:
        (self.name,) = names
        self.steps: list[int] = []
        self._fail("start")

    def _fail(self, where: str) -> None:
        if self.name == where:
            raise ConnectionError(f"no network\nat {where}")

    def log(self, data: dict[str, Any], step: int, backend: Any) -> None:
        self._fail("log")
        self.steps.append(step)

    def finish(self, exit_code: int) -> None:
        self._fail("finish")
        if self.name == "hang":
            threading.Event().wait()


def test_a_tracker_that_fails_is_left_out_and_the_others_continue() -> None:
    said: list[str] = []
    made: dict[str, Backend] = {}

    def make(*args: Any) -> Backend:
        made[args[2][0]] = Backend(*args)
        return made[args[2][0]]

    found = Trackers(
        make, said.append, project_name="p", experiment_name="e", default_backend=["start", "log", "good"]
    )
    for step in (1, 2):
        found.log(data={"loss": 1.0}, step=step)
    found.finish()
    assert made["good"].steps == [1, 2]
    assert said == [
        "start is left out from here on (ConnectionError: no network)",
        "log is left out from here on (ConnectionError: no network)",
    ]


def test_a_tracker_that_does_not_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.05)
    said: list[str] = []
    Trackers(Backend, said.append, "p", "e", ["hang", "finish"]).finish()
    assert said[0].startswith("hang could not send everything") and said[1].startswith("finish is left out")
