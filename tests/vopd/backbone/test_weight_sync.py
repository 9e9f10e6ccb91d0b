"""The trainer's side of a weight sync ends when the rollout's side has failed, whatever the sender waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from verl.workers.rollout.vllm_rollout import bucketed_weight_transfer, vllm_rollout

from vopd.backbone import weight_sync
from vopd.backbone.weight_sync import Answered, Sender, install


class RefusedError(Exception):
    """What the rollout raised."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_sync, "LOOK_MILLISECONDS", 20)
    monkeypatch.setattr(vllm_rollout, "BucketedWeightSender", vllm_rollout.BucketedWeightSender)
    monkeypatch.setattr(Sender, "receiver", None)
    # Which device verl finds depends on what this process has imported; the sender tidies up on it in the end.
    device = SimpleNamespace(ipc_collect=lambda: None, empty_cache=lambda: None)
    monkeypatch.setattr(bucketed_weight_transfer, "get_torch_device", lambda: device)


def fails_at_the(look: int) -> Callable[[], None]:
    """A receiver that fails when it is looked at for the n-th time."""
    looks = iter(range(1, look + 1))

    def check() -> None:
        if next(looks) == look:
            raise RefusedError

    return check


def test_a_receiver_that_never_comes(tmp_path: Path) -> None:
    socket = zmq.Context.instance().socket(zmq.REQ)
    socket.bind(f"ipc://{tmp_path}/a.sock")
    answered = Answered(socket, fails_at_the(3))
    with pytest.raises(RefusedError):
        answered.send_pyobj({})
    answered.close()


def test_a_receiver_that_does_not_answer_any_more(tmp_path: Path) -> None:
    sending, receiving = (zmq.Context.instance().socket(kind) for kind in (zmq.REQ, zmq.REP))
    sending.bind(f"ipc://{tmp_path}/a.sock")
    receiving.connect(f"ipc://{tmp_path}/a.sock")
    answered = Answered(sending, fails_at_the(3))
    answered.send_pyobj({"a": 1})
    assert receiving.recv_pyobj() == {"a": 1}
    receiving.send(b"yes")
    assert answered.recv() == b"yes"
    answered.send_pyobj({})
    with pytest.raises(RefusedError):
        answered.recv()
    answered.close()
    receiving.close()


def test_verls_sender_raises_what_its_receiver_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(call: Any) -> None:
        raise RefusedError(call)

    monkeypatch.setattr(weight_sync, "ray", SimpleNamespace(wait=lambda calls, timeout: (calls, []), get=get))

    async def execute(method: str, non_block: bool = False) -> str:
        return f"call of {method}"

    rollout = SimpleNamespace(_execute_method=execute)
    install(rollout)
    assert asyncio.run(rollout._execute_method("sleep")) == "call of sleep" and Sender.receiver is None
    asyncio.run(rollout._execute_method("update_weights_from_ipc", non_block=True))
    sender = vllm_rollout.BucketedWeightSender(f"ipc://{tmp_path}/b.sock", bucket_size_mb=1, use_shm=True)
    with pytest.raises(RefusedError, match="call of update_weights_from_ipc"):
        asyncio.run(sender.async_send_weights(iter([])))
    assert not (tmp_path / "b.sock").exists()
