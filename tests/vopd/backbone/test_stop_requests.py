"""A request to stop: at once while a run is loading, at the next check while it trains."""

import os
import signal
from collections.abc import Iterator

import pytest

from vopd.backbone import stop_requests
from vopd.backbone.replay_buffer import GroupBuffer


@pytest.fixture(autouse=True)
def handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(stop_requests, "_requested", False)
    before = signal.getsignal(signal.SIGTERM)
    stop_requests.install()
    yield
    signal.signal(signal.SIGTERM, before)


def ask() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_loading_run_stops_on_the_spot() -> None:
    with pytest.raises(stop_requests.Stopped):
        ask()


def test_a_training_run_stops_at_the_next_check() -> None:
    with stop_requests.patiently():
        ask()  # nothing is raised here
        with pytest.raises(stop_requests.Stopped):
            stop_requests.check()


def test_a_request_before_training_is_not_forgotten() -> None:
    with pytest.raises(stop_requests.Stopped):
        ask()
    with pytest.raises(stop_requests.Stopped), stop_requests.patiently():
        pytest.fail("trained")


def test_waiting_for_rollouts_is_a_check() -> None:
    buffer = GroupBuffer.__new__(GroupBuffer)
    with stop_requests.patiently():
        ask()
        with pytest.raises(stop_requests.Stopped):
            buffer._wait_for_next_poll("train", 0.0)
