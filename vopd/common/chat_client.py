"""Requests to an OpenAI-compatible chat server: bounded, tried again, and read without trust. Evaluation, the judge and
the synthesis of triplets ask through this one client.

A reply is whatever a server, or a proxy before it, chose to send. So a whole try has a time limit (a limit on each read
is defeated by a byte a second), a body has a size limit (and is asked for uncompressed, so that none unfolds to more),
redirects are not followed (they would carry pictures and key elsewhere), and every field is checked for its type. What
cannot be used is `NoAnswerError`, the problem of this one request.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
from collections.abc import Coroutine, Iterable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import httpx
from pydantic import BaseModel, BeforeValidator, Field, StrictStr, ValidationError
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from vopd.errors import UserError

MOST_BYTES = 16 * 2**20  # 32,768 tokens are far less than one MiB
RETRY_AFTER_LIMIT_S = 600.0
_LAST_WORD = (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY)
_SETTINGS = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND)
_PASSING = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS)


class NoAnswerError(Exception):
    """No usable reply to this request; the message is a sentence. It should be asked again at another time."""


class OutageError(NoAnswerError):
    """The server, or the way to it, failed: worth a retry, after `wait_s` seconds if the server asks for that."""

    def __init__(self, sentence: str, wait_s: float | None = None) -> None:
        super().__init__(sentence)
        self.wait_s = wait_s


class RefusedError(NoAnswerError):
    """The server will never take this request (400, 413, 422), such as a prompt beyond its length."""

    def __init__(self, sentence: str, status: int, detail: str) -> None:
        super().__init__(sentence)
        self.status, self.detail = status, detail


def _text_or_none(value: Any) -> Any:
    return value if isinstance(value, str) else None


def _count_or_none(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value < 2**31 else None


def _first(value: Any) -> Any:
    return value[:1] if isinstance(value, list) else value


# What is good to know but no part of the answer must not cost the answer.
_Extra = Annotated[str | None, BeforeValidator(_text_or_none)]
_Count = Annotated[int | None, BeforeValidator(_count_or_none)]


class _Message(BaseModel):
    content: StrictStr | None = None
    refusal: _Extra = None
    reasoning_content: _Extra = None
    reasoning: _Extra = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: _Extra = None


class _Usage(BaseModel):
    prompt_tokens: _Count = None
    completion_tokens: _Count = None


class _Body(BaseModel):
    choices: Annotated[list[_Choice], BeforeValidator(_first), Field(min_length=1)]
    usage: Annotated[_Usage, BeforeValidator(lambda value: value if isinstance(value, dict) else {})] = (
        _Usage()
    )


class Completion(BaseModel):
    """A usable reply. Token counts are None where the server gives none, or none that can be; reasoning is what a
    server with a reasoning parser hands over apart from the text."""

    text: str
    refusal: str | None
    reasoning: str | None
    finish_reason: str | None
    prompt_tokens: int | None
    response_tokens: int | None


def read_completion(content: bytes) -> Completion:
    """The first choice of a reply's body; NoAnswerError, saying what is wrong, for any other body."""
    try:
        body = _Body.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        begins = one_line(content[:80].decode(errors="replace"))
        raise NoAnswerError(
            f"the reply is not a chat completion ({place + ': ' if place else ''}{one_line(first['msg'])}); "
            f"it begins {begins!r}"
        ) from error
    choice, usage = body.choices[0], body.usage
    message = choice.message
    reasoning = message.reasoning_content or message.reasoning
    explained = message.refusal or reasoning or choice.finish_reason in ("length", "content_filter")
    if message.content is None and not explained:
        raise NoAnswerError("the reply holds no text")
    return Completion(
        text=message.content or "",
        refusal=message.refusal,
        reasoning=reasoning,
        finish_reason=choice.finish_reason,
        prompt_tokens=usage.prompt_tokens,
        response_tokens=usage.completion_tokens,
    )


def one_line(text: str, limit: int = 200) -> str:
    """Text from outside as a part of a sentence: one line without control signs, at most `limit` characters."""
    plain = "".join(c if c.isprintable() else " " for c in text[: 4 * limit])
    return " ".join(plain.split())[:limit]


def retry_after(value: str) -> float | None:
    """Seconds in a Retry-After header (a number or a date, RFC 9110 section 10.2.3), None when there are none."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return None
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        seconds = (moment - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), RETRY_AFTER_LIMIT_S) if seconds == seconds else None


class Server:
    """A chat server. Its key is the environment's OPENAI_API_KEY, if there is one.

    Args:
        url: base address, such as http://localhost:8000/v1.
        timeout_s: of one try, from the first byte sent to the last one received.
        tries: how often a request is sent before an outage is its end.
        first_wait_s: seconds between tries, with jitter, doubled each time; a server may ask for others.
        longest_wait_s: the most these grow to.
        socket: of a server on this machine that listens at a Unix socket; the address is then but a name.

    Raises:
        UserError: an invalid address; a proxy in the environment, or a key, that cannot be used.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float,
        tries: int = 5,
        first_wait_s: float = 0.5,
        longest_wait_s: float = 8.0,
        socket: Path | None = None,
    ) -> None:
        address = _address(url)
        self.name = str(address.copy_with(userinfo=b""))
        self._url = f"{str(address).rstrip('/')}/chat/completions"
        self._timeout_s, self._tries = timeout_s, tries
        self._backoff = wait_random_exponential(first_wait_s, longest_wait_s)
        self._http = _http(address, timeout_s, socket)

    async def complete(self, body: Mapping[str, Any]) -> Completion:
        """The reply to one request.

        Raises:
            NoAnswerError: no usable reply; `RefusedError` where a retry would not help.
        """
        attempts = AsyncRetrying(
            stop=stop_after_attempt(self._tries),
            retry=retry_if_exception_type(OutageError),
            wait=self._wait,
            reraise=True,
        )
        return await attempts(self._try, json.dumps(body).encode())

    async def close(self) -> None:
        """Give back the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _try(self, request: bytes) -> Completion:
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._http.stream("POST", self._url, content=request) as response,
            ):
                content = await _content(response)
        except TimeoutError as error:
            raise OutageError(f"no whole reply within {self._timeout_s:g} s") from error
        except (httpx.HTTPError, OSError) as error:
            raise OutageError(
                f"the connection failed ({type(error).__name__}: {one_line(str(error))})"
            ) from error
        if not response.is_success:
            raise _status_error(response, content)
        return read_completion(content)

    def _wait(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.wait_s if isinstance(error, OutageError) else None
        return self._backoff(state) if asked is None else asked


async def together(workers: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Wait for all; the first error cancels the others and is raised as itself, not as a group."""
    tasks = [asyncio.create_task(worker) for worker in workers]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _content(response: httpx.Response) -> bytes:
    """The body; NoAnswerError when it is compressed, or larger than MOST_BYTES (the rest is not read)."""
    encoding = response.headers.get("content-encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        raise NoAnswerError(f"the reply is compressed ({one_line(encoding)}), which was not asked for")
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > MOST_BYTES:
            raise NoAnswerError(f"the reply is longer than {MOST_BYTES} bytes")
    return bytes(content)


def _status_error(response: httpx.Response, content: bytes) -> NoAnswerError:
    status, said = response.status_code, one_line(content[:2000].decode(errors="replace"))
    sentence = f"status {status}" + (f": {said}" if said else "")
    if status in _PASSING or status >= 500:
        return OutageError(sentence, retry_after(response.headers.get("retry-after", "")))
    if status in _LAST_WORD:
        return RefusedError(sentence, status, said)
    if status in _SETTINGS:
        return NoAnswerError(f"{sentence}; check the server's address, the model's name and OPENAI_API_KEY")
    if response.is_redirect:
        target = one_line(response.headers.get("location", "nowhere"))
        return NoAnswerError(f"status {status}, a redirect to {target}; give the server's own address")
    return NoAnswerError(sentence)


def _address(url: str) -> httpx.URL:
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UserError(
            f"'{url}' is not the address of a server ({error}); write http://HOST:PORT/v1."
        ) from error
    strange = " " in url or address.query or address.fragment
    if address.scheme not in ("http", "https") or not address.host or strange:
        raise UserError(f"'{url}' is not the address of a server; write http://HOST:PORT/v1.")
    return address


def _is_local(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _http(address: httpx.URL, timeout_s: float, socket: Path | None = None) -> httpx.AsyncClient:
    """A client that goes through the environment's proxies, but never to this machine itself."""
    key = os.environ.get("OPENAI_API_KEY") or "none"
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise UserError("OPENAI_API_KEY holds spaces or characters that no key has; set it again.")
    headers = {
        "Authorization": f"Bearer {key}",
        "Content-Type": "application/json",
        "Accept": "application/json",
        "Accept-Encoding": "identity",
    }
    # How many requests are under way is the caller's to bound.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    # With a transport of its own a client leaves the environment's proxies alone.
    local = socket is not None or _is_local(address.host)
    own = httpx.AsyncHTTPTransport(limits=limits, uds=str(socket) if socket else None) if local else None
    try:
        return httpx.AsyncClient(headers=headers, timeout=timeout_s, limits=limits, transport=own)
    except ImportError as error:  # httpx's word for a SOCKS proxy without socksio
        raise UserError(
            f"The environment's proxy cannot be used ({one_line(str(error))}); install socksio, or unset ALL_PROXY, or "
            f"put {address.host} into NO_PROXY."
        ) from error
    except (ValueError, OSError, httpx.InvalidURL) as error:
        raise UserError(
            f"The environment's proxy or certificates cannot be used ({one_line(str(error))}); fix HTTP_PROXY, "
            "HTTPS_PROXY, ALL_PROXY, NO_PROXY or SSL_CERT_FILE."
        ) from error
