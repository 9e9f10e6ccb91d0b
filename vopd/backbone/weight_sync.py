"""The trainer does not wait for ever for a rollout that cannot take its weights.

verl's sender waits for the receiver's answers on a socket, without an end, and looks at the receiver's call only
afterwards: where vLLM refuses the weights (LoRA on a CPU, a shape that does not fit) or its engine dies, the run hangs.
Here the sender looks at that call while it waits, and raises what it raised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
import zmq
from verl.workers.rollout.vllm_rollout import vllm_rollout
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

LOOK_MILLISECONDS = 500
RECEIVE = "update_weights_from_ipc"


class Answered:
    """A socket whose sends and receives end with `check` raising; everything else is the socket's own."""

    def __init__(self, socket: Any, check: Callable[[], None]) -> None:
        self.socket, self.check = socket, check

    def _wait(self, event: int) -> None:
        while not self.socket.poll(LOOK_MILLISECONDS, event):
            self.check()

    def send_pyobj(self, value: Any) -> None:
        """As the socket's."""
        self._wait(zmq.POLLOUT)
        self.socket.send_pyobj(value)

    def recv(self) -> bytes:
        """As the socket's."""
        self._wait(zmq.POLLIN)
        return bytes(self.socket.recv())

    def close(self) -> None:
        """As the socket's; what will not be read is dropped."""
        self.socket.close(linger=0)


class Sender(BucketedWeightSender):
    """verl's sender on such a socket."""

    socket: Any
    receiver: Any = None
    """The receiver's call of this sync (`install` sets it)."""

    def _init_socket(self) -> None:
        super()._init_socket()
        self.socket = Answered(self.socket, self._check)

    def _check(self) -> None:
        if self.receiver is not None and ray.wait([self.receiver], timeout=0)[0]:
            ray.get(self.receiver)


def install(rollout: Any) -> None:
    """Have this worker's rollout (verl's ServerAdapter) send its weights so."""
    execute = rollout._execute_method

    async def remembering(method: str, *args: Any, **kwargs: Any) -> Any:
        result = await execute(method, *args, **kwargs)
        if method == RECEIVE:
            Sender.receiver = result
        return result

    rollout._execute_method = remembering
    vllm_rollout.BucketedWeightSender = Sender
