"""Requests to an OpenAI-compatible server: bounded concurrency, back-off, and a reason for every unusable reply.

Three ends of a request are told apart. A *reply* is text. A *rejection* is the server's or the model's last word on
this item (refused, cut off, not JSON, a request it cannot take): it is recorded and not asked again. An *outage*
(429, 5xx, a lost connection, a time-out) is retried, and when all tries are used up it is not recorded, so that the
next start asks again.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar

import openai
from omegaconf import DictConfig
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ValidationError
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)
from tqdm import tqdm

from data.synthesis.journal import Journal, Record
from vopd.errors import UserError
from vopd.evaluation.scoring.clean import cut_reasoning, is_refusal
from vopd.seeding import request_seed

OUTAGES = (openai.RateLimitError, openai.InternalServerError, openai.APIConnectionError)
SETTINGS_AT_FAULT = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
OUTAGES_IN_A_ROW = 20
RETRY_AFTER_LIMIT_S = 600.0
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
        self.base_url = base_url or server.base_url
        # The package's own retries would multiply with ours.
        self._openai = openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            max_retries=0,
            timeout=server.timeout_s,
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._openai.close()

    async def send(self, request: Request) -> Reply:
        """The model's text.

        Raises:
            RejectedError: the last word on this request.
            OUTAGES: no answer after the last try.
            UserError: the server does not know the model or the key.
        """
        attempts = AsyncRetrying(
            stop=stop_after_attempt(self.server.tries),
            retry=retry_if_exception_type(OUTAGES),
            wait=self._wait,
            reraise=True,
        )
        try:
            completion = await attempts(self._create, request)
        except OUTAGES:
            raise
        except SETTINGS_AT_FAULT as error:
            raise UserError(
                f"{self.base_url} refused the model '{self.model}' ({error.status_code}: {error.message}); "
                "check the server's address, the model's name and OPENAI_API_KEY."
            ) from error
        except openai.APIStatusError as error:
            raise RejectedError(f"request refused with status {error.status_code}", error.message) from error
        except (json.JSONDecodeError, openai.APIResponseValidationError) as error:
            raise RejectedError("reply breaks the protocol", str(error)) from error
        return self._read(completion)

    async def _create(self, request: Request) -> ChatCompletion:
        picture = base64.b64encode(request.image.read_bytes()).decode()
        url = f"data:image/{MEDIA[request.image.suffix.lower()]};base64,{picture}"
        return await self._openai.chat.completions.create(
            model=self.model,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": url}},
                        {"type": "text", "text": request.prompt},
                    ],
                }
            ],
            temperature=request.temperature,
            top_p=request.top_p,
            max_tokens=self.server.max_tokens,
            seed=request_seed(self.seed, 0, request.id, 0),
        )

    def _wait(self, state: RetryCallState) -> float:
        """Seconds to the next try: what the server asks for, else exponential with jitter."""
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, openai.APIStatusError):
            asked = retry_after(error.response.headers.get("retry-after", ""))
            if asked is not None:
                return asked
        backoff = wait_random_exponential(self.server.first_wait_s, self.server.longest_wait_s)
        return backoff(state)

    @staticmethod
    def _read(completion: object) -> Reply:
        # A body that is JSON of another shape comes back as an object without its fields, or as text.
        choices = getattr(completion, "choices", None)
        if not choices or choices[0].message is None:
            raise RejectedError("reply breaks the protocol", repr(completion))
        choice = choices[0]
        if choice.message.refusal or choice.finish_reason == "content_filter":
            raise RejectedError("the model refused", choice.message.refusal or "content filter")
        if choice.finish_reason == "length":
            raise RejectedError("reply cut off at max_tokens", choice.message.content or "")
        text = cut_reasoning(choice.message.content or "")
        if not text or not text.strip():
            raise RejectedError("empty reply")
        usage = getattr(completion, "usage", None)
        return Reply(text.strip(), (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0))


def retry_after(value: str) -> float | None:
    """Seconds in a Retry-After header (a number or a date, RFC 9110 section 10.2.3), None when there are none."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value)
        except ValueError:
            return None
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        seconds = (moment - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), RETRY_AFTER_LIMIT_S) if seconds == seconds else None


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
) -> int:
    """Send every request whose id the journal lacks, `server.concurrency` at a time; how many stayed unanswered.

    read: makes the fields of a record from a reply, or raises `RejectedError`. After OUTAGES_IN_A_ROW requests
    without an answer the server counts as down: `UserError`, with everything answered kept.
    """
    waiting = [r for r in requests if r.id not in journal.records]
    queue = iter(tqdm(waiting, desc=f"synthesis: {name}", disable=not waiting))
    unanswered, in_a_row = 0, 0

    async def work() -> None:
        nonlocal unanswered, in_a_row
        for request in queue:
            record: Record = {"id": request.id, "reason": None, "tokens": [0, 0]}
            try:
                reply = await client.send(request)
                in_a_row, record["tokens"] = 0, list(reply.tokens)
                record |= read(request, reply.text)
            except RejectedError as rejection:
                in_a_row = 0
                record |= {"reason": str(rejection), "detail": rejection.detail}
            except OUTAGES as error:
                unanswered, in_a_row = unanswered + 1, in_a_row + 1
                if in_a_row >= OUTAGES_IN_A_ROW:
                    raise UserError(
                        f"{client.base_url} left {in_a_row} requests in a row unanswered ({error}); what is done is "
                        "kept: start the server and run the same command again."
                    ) from error
                continue
            journal.append(record)

    await _together([work() for _ in range(min(client.server.concurrency, len(waiting)))])
    return unanswered


async def _together(workers: list[Awaitable[None]]) -> None:
    """Wait for all; the first error cancels the others and is raised as itself, not as a group."""
    tasks = [asyncio.ensure_future(worker) for worker in workers]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
