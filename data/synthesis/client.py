"""Requests to an OpenAI-compatible server: bounded concurrency, and a reason for every unusable reply.

A request ends in one of three ways. A *reply* is text. A *rejection* is the server's or the model's final answer to
this item (refused, cut off, not JSON, a request it cannot take): it is recorded and not asked again. *No answer* (an
outage that outlasted all tries, or a reply that is not a chat completion) is not recorded, so that the next start asks
again.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from omegaconf import DictConfig
from pydantic import BaseModel, ValidationError
from tqdm import tqdm

from data.synthesis.journal import Journal, Record
from vopd.common import chat_client, control_tokens
from vopd.common.chat_client import Completion, NoAnswerError, RefusedError, together
from vopd.common.seeding import request_seed
from vopd.errors import UserError
from vopd.evaluation.scoring.clean import cut_reasoning, is_refusal

UNANSWERED_IN_A_ROW = 20
MEDIA = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp"}
Shape = TypeVar("Shape", bound=BaseModel)


class RejectedError(Exception):
    """An item's end: the message is the reason that is recorded and counted, `detail` what was received."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail[:300]


@dataclass(frozen=True)
class Request:
    """One question to the model about one image file. `id` seeds it: equal ids get equal seeds."""

    id: str
    image: Path
    prompt: str
    temperature: float
    top_p: float = 1.0


@dataclass(frozen=True)
class Reply:
    """What came back: text, and tokens in and out."""

    text: str
    tokens: tuple[int, int]


class Client:
    """A model behind a server; use as an async context manager."""

    def __init__(self, server: DictConfig, seed: int, base_url: str = "", model: str = "") -> None:
        self.server, self.seed = server, seed
        self.model = model or server.model
        self._server = chat_client.Server(
            base_url or server.base_url,
            server.timeout_s,
            server.tries,
            server.first_wait_s,
            server.longest_wait_s,
        )

    @property
    def name(self) -> str:
        """The server's address."""
        return self._server.name

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.close()

    async def send(self, request: Request) -> Reply:
        """The model's text.

        Raises:
            RejectedError: the last word on this request.
            NoAnswerError: no answer after the last try, or none that can be used.
        """
        try:
            return _read(await self._server.complete(self._body(request)))
        except RefusedError as error:
            raise RejectedError(f"request refused with status {error.status}", error.detail) from error

    def _body(self, request: Request) -> dict[str, object]:
        picture = base64.b64encode(request.image.read_bytes()).decode()
        url = f"data:image/{MEDIA[request.image.suffix.lower()]};base64,{picture}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": control_tokens.escape(request.prompt, control_tokens.pattern())},
        ]
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": request.temperature,
            "top_p": request.top_p,
            "max_tokens": self.server.max_tokens,
            "seed": request_seed(self.seed, 0, request.id, 0),
        }


def _read(completion: Completion) -> Reply:
    if completion.refusal or completion.finish_reason == "content_filter":
        raise RejectedError("the model refused", completion.refusal or "content filter")
    if completion.finish_reason == "length":
        raise RejectedError("reply cut off at max_tokens", completion.text)
    text = cut_reasoning(completion.text)
    if not text or not text.strip():
        raise RejectedError("empty reply")
    return Reply(text.strip(), (completion.prompt_tokens or 0, completion.response_tokens or 0))


def read_json(text: str, shape: type[Shape]) -> Shape:
    """The first JSON object in a reply, code fences and words around it allowed, as `shape`; raises `RejectedError`."""
    if is_refusal(text) and "{" not in text:
        raise RejectedError("the model refused", text)
    try:
        value, _ = json.JSONDecoder().raw_decode(text, max(text.find("{"), 0))
        return shape.model_validate(value)
    except (ValueError, ValidationError, RecursionError) as error:
        raise RejectedError("reply is not the JSON asked for", text) from error


async def ask_all(
    client: Client,
    requests: Iterable[Request],
    read: Callable[[Request, str], Record],
    journal: Journal,
    name: str,
) -> list[str]:
    """Send every request whose id the journal lacks, `server.concurrency` at a time; why some stayed unanswered.

    read: makes the fields of a record from a reply, or raises `RejectedError`. After UNANSWERED_IN_A_ROW requests
    without an answer the server counts as down: `UserError`, with everything answered kept.
    """
    waiting = [r for r in requests if r.id not in journal.records]
    queue = iter(tqdm(waiting, desc=f"synthesis: {name}", disable=not waiting))
    unanswered: list[str] = []
    in_a_row = 0

    async def work() -> None:
        nonlocal in_a_row
        for request in queue:
            record: Record = {"id": request.id, "reason": None, "tokens": [0, 0]}
            try:
                reply = await client.send(request)
                in_a_row, record["tokens"] = 0, list(reply.tokens)
                record |= read(request, reply.text)
            except RejectedError as rejection:
                in_a_row = 0
                record |= {"reason": str(rejection), "detail": rejection.detail}
            except NoAnswerError as error:
                unanswered.append(f"{name}, {request.id}: {error}")
                in_a_row += 1
                if in_a_row >= UNANSWERED_IN_A_ROW:
                    raise UserError(
                        f"{client.name} left {in_a_row} requests in a row unanswered ({error}); what is done is "
                        "kept: start the server and run the same command again."
                    ) from error
                continue
            journal.append(record)

    await together(work() for _ in range(min(client.server.concurrency, len(waiting))))
    return unanswered
