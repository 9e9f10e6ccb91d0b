"""A request to stop: at once while a run is loading, at the next check while it trains."""

import os
import signal
from collections.abc import Iterator

import pytest

from vopd.backbone import stopping
from vopd.backbone.groups import GroupBuffer


@pytest.fixture(autouse=True)
def handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(stopping, "_requested", False)
    before = signal.getsignal(signal.SIGTERM)
    stopping.install()
    yield
    signal.signal(signal.SIGTERM, before)


def ask() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_loading_run_stops_on_the_spot() -> None:
    with pytest.raises(stopping.Stopped):
        ask()


def test_a_training_run_stops_at_the_next_check() -> None:
    with stopping.patiently():
        ask()  # nothing is raised here
        with pytest.raises(stopping.Stopped):
            stopping.check()


def test_a_request_before_training_is_not_forgotten() -> None:
    with pytest.raises(stopping.Stopped):
        ask()
    with pytest.raises(stopping.Stopped), stopping.patiently():
        pytest.fail("trained")


def test_waiting_for_rollouts_is_a_check() -> None:
    buffer = GroupBuffer.__new__(GroupBuffer)
    with stopping.patiently():
        ask()
        with pytest.raises(stopping.Stopped):
            buffer._wait_for_next_poll("train", 0.0)
