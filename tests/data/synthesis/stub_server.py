"""A stand-in for a model server: speaks the chat-completions protocol with images, answers by rule, fails on demand.

For tests, and as a process of its own (`--port`, `--delay`) for `benchmarks/synthesis.py`. It listens on this machine
only, and what it answers means nothing.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import io
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image, UnidentifiedImageError

RETRY_AFTER = "0.3"
QUESTIONS = ("What is the colour of most of it?", "Which channel is darkest?", "What number comes to mind?")


def answer(image: Image.Image, text: str, seed: int) -> str:
    """What the stub says: the same for the same image, text and seed."""
    means = image.convert("RGB").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert isinstance(means, tuple)
    names = ("red", "green", "blue")
    if '"objects"' in text:
        return json.dumps({"objects": ["sign", "window"]})
    if '"questions"' in text:
        return "Here they are:\n```json\n" + json.dumps({"questions": QUESTIONS}) + "\n```"
    if '"valid"' in text:
        return json.dumps({"valid": "darkest" not in text or means[0] > 40, "why": "by rule"})
    if '"distractors"' in text:
        return json.dumps({"distractors": ["violet", "teal", "beige"]})
    if re.search(r"^A\) ", text, re.M):
        return f"The answer is {'ABCD'[seed % 4]}."
    if "number" in text.split("\n")[0]:
        return f"Answer: {seed % 97}"
    return names[means.index(min(means) if "darkest" in text else max(means))] + "."


class _Server(ThreadingHTTPServer):
    # With a queue of 5 a busy client loses connections, and tries those again after a second.
    request_queue_size = 128


class StubServer:
    """Use as a context manager; `url` is the base URL, `bodies` the requests received in order.

    faults: number of the request (from 0) -> kind of fault, a method of `_Handler` named `fault_<kind>`.
    delay_s: how long every reply takes. reply: (image, text, seed) -> the reply's text.
    """

    def __init__(
        self,
        faults: dict[int, str] | None = None,
        delay_s: float = 0.0,
        reply: Callable[[Image.Image, str, int], str] = answer,
        port: int = 0,
    ) -> None:
        self.faults, self.delay_s, self.reply = faults or {}, delay_s, reply
        self.bodies: list[dict[str, Any]] = []
        self.moments: list[float] = []
        self.busy = self.most_busy = 0
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.server = _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"stub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self) -> StubServer:
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    stub: StubServer
    protocol_version = "HTTP/1.1"
    # Without it, headers and body wait for each other's acknowledgement (40 ms a reply).
    wbufsize = -1

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stub = self.stub
        with stub.lock:
            number = len(stub.bodies)
            stub.bodies.append(body)
            stub.moments.append(time.monotonic())
            stub.busy += 1
            stub.most_busy = max(stub.most_busy, stub.busy)
        try:
            stub.closing.wait(stub.delay_s)
            if self.path != "/v1/chat/completions":
                self._send(404, {"error": {"message": "no such path"}})
            elif number in stub.faults:
                getattr(self, f"fault_{stub.faults[number]}")()
            else:
                self._answer(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client did not wait
        finally:
            with stub.lock:
                stub.busy -= 1

    def _answer(self, body: dict[str, Any]) -> None:
        parts = {part["type"]: part for part in body["messages"][-1]["content"]}
        try:
            head, data = parts["image_url"]["image_url"]["url"].split(",", 1)
            image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            image.load()
            right = head == f"data:image/{str(image.format).lower()};base64"
        except (KeyError, ValueError, binascii.Error, UnidentifiedImageError, OSError):
            right = False
        if not right:
            self._send(400, {"error": {"message": "the image is not one"}})
            return
        self._say(self.stub.reply(image, parts["text"]["text"], body["seed"]))

    def _say(self, content: str | None, finish: str = "stop", refusal: str | None = None) -> None:
        message = {"role": "assistant", "content": content, "refusal": refusal}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        about = {"id": "stub", "object": "chat.completion", "created": 0, "model": "stub"}
        self._send(200, {**about, "choices": [choice], "usage": usage})

    def _send(self, status: int, body: dict[str, Any] | bytes, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def fault_busy(self) -> None:
        """429 with the time to wait."""
        self._send(429, {"error": {"message": "slow down"}}, Retry_After=RETRY_AFTER)

    def fault_broken(self) -> None:
        """500."""
        self._send(500, {"error": {"message": "internal"}})

    def fault_silent(self) -> None:
        """Nothing for longer than a client waits."""
        self.stub.closing.wait(30)
        self.close_connection = True

    def fault_half_closed(self) -> None:
        """A body that ends before its announced length."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'{"id": "stub", "choi')
        self.wfile.flush()
        self.close_connection = True

    def fault_no_protocol(self) -> None:
        """A body that is not JSON although its type says JSON."""
        self._send(200, b'{"id": "stub", "choices": [')

    def fault_other_shape(self) -> None:
        """JSON without the fields of a completion."""
        self._send(200, {"hello": "world"})

    def fault_no_json(self) -> None:
        """Prose in place of the JSON asked for."""
        self._say('{"questions": ["What is')

    def fault_wrong_shape(self) -> None:
        """JSON of another shape than asked for."""
        self._say('{"questions": "none", "valid": "perhaps", "distractors": [1]}')

    def fault_refusal(self) -> None:
        """A refusal in the protocol's own field."""
        self._say(None, refusal="I will not.")

    def fault_sorry(self) -> None:
        """A refusal in prose."""
        self._say("I'm sorry, but I cannot help with this image.")

    def fault_cut_off(self) -> None:
        """A reply that ran into the token limit."""
        self._say('{"questions": [', finish="length")

    def fault_too_long(self) -> None:
        """400, as a server does for a prompt it cannot take."""
        self._send(400, {"error": {"message": "prompt too long"}})

    def fault_unknown_model(self) -> None:
        """404, as a server does for a model it does not hold."""
        self._send(404, {"error": {"message": "no such model"}})

    def log_message(self, format: str, *args: object) -> None:
        """Keep the terminal for the client."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds a reply takes")
    args = parser.parse_args()
    with StubServer(delay_s=args.delay, port=args.port) as stub:
        print(f"listening on {stub.url}; Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
