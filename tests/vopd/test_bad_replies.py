"""Replies of every bad kind, from a server on this machine, to an evaluation, a judge and a synthesis: one bad reply is
the problem of its own question, is asked again by the next run, and all others are answered."""

import asyncio
import base64
import gzip
import io
import json
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from data.synthesis import client as synthesis
from data.synthesis.config import Server as ServerSettings
from data.synthesis.journal import Journal
from vopd.common import chat_client
from vopd.common.chat_client import NoAnswerError, read_completion, retry_after
from vopd.errors import UserError
from vopd.evaluation import asking, evaluate, judge
from vopd.evaluation.records import read_answers

MESSAGE = {"role": "assistant", "content": "Answer: yes"}
CHOICE = {"index": 0, "message": MESSAGE, "finish_reason": "stop"}
USAGE = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
GOOD = {"id": "x", "object": "chat.completion", "choices": [CHOICE], "usage": USAGE}


def raw(
    body: bytes | object, status: str = "200 OK", kind: str = "application/json", **headers: str
) -> bytes:
    """A whole HTTP reply."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if "Content_Length" not in headers and "Transfer_Encoding" not in headers:
        lines.append(f"Content-Length: {len(content)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def message(**fields: object) -> bytes:
    return raw(GOOD | {"choices": [CHOICE | {"message": MESSAGE | fields}]})


HTML = b"<html><body>502 \x1b[31mBad Gateway</body></html>"
# Sent as they stand; the connection then ends.
NO_ANSWER = {
    "cut JSON": raw(json.dumps(GOOD).encode()[:60]),
    "HTML": raw(HTML, kind="text/html"),
    "HTML with status 502": raw(HTML, "502 Bad Gateway", "text/html"),
    "status 500": raw(b"", "500 Internal Server Error"),
    "status 503, come back at once": raw(b"", "503 Busy", Retry_After="0"),
    "status 429, a broken Retry-After": raw(b"", "429 Slow down", Retry_After="\x7f, soon"),
    "status 204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "status 400": raw({"error": {"message": "prompt too long"}}, "400 Bad Request"),
    "status 401": raw({"error": None}, "401 Unauthorized"),
    "status 404": raw(b"null", "404 Not Found"),
    "status 418": raw(b"\xff\xfe", "418 I'm a teapot"),
    "status 999": raw(b"?", "999 Nobody knows"),
    "a redirect": raw(b"", "307 Temporary Redirect", Location="http://127.0.0.1:9/v1/chat/completions"),
    "a redirect to nowhere": raw(b"", "302 Found"),
    "empty body": raw(b""),
    "blank body": raw(b" \n" * 50),
    "null": raw(b"null"),
    "a number": raw(b"12"),
    "a text": raw(b'"yes"'),
    "a list": raw([GOOD]),
    "an empty object": raw({}),
    "an error with status 200": raw({"error": {"message": "out of memory"}}),
    "two objects": raw(json.dumps(GOOD).encode() * 2),
    "bad UTF-8": raw(json.dumps(GOOD).encode().replace(b"Answer", b"\xff\xfe\x80")),
    "UTF-16": raw(json.dumps(GOOD).encode("utf-16")),
    "half a surrogate": raw(json.dumps(GOOD).encode().replace(b"Answer", b"\\ud800")),
    "ten thousand brackets": raw(b"[" * 10_000),
    "a stream of events": raw(b"data: {}\n\ndata: [DONE]\n\n", kind="text/event-stream"),
    "choices missing": raw({"usage": USAGE}),
    "choices null": raw(GOOD | {"choices": None}),
    "choices empty": raw(GOOD | {"choices": []}),
    "choices a text": raw(GOOD | {"choices": "yes"}),
    "choices an object": raw(GOOD | {"choices": {"0": CHOICE}}),
    "choices of numbers": raw(GOOD | {"choices": [1]}),
    "choices of nulls": raw(GOOD | {"choices": [None]}),
    "message missing": raw(GOOD | {"choices": [{"finish_reason": "stop"}]}),
    "message null": raw(GOOD | {"choices": [CHOICE | {"message": None}]}),
    "message a text": raw(GOOD | {"choices": [CHOICE | {"message": "yes"}]}),
    "content missing": raw(GOOD | {"choices": [CHOICE | {"message": {"role": "assistant"}}]}),
    "content null": message(content=None),
    "content a number": message(content=7),
    "content a bool": message(content=True),
    "content a list of parts": message(content=[{"type": "text", "text": "yes"}]),
    "content an object": message(content={"text": "yes"}),
    "a body shorter than it says": raw(json.dumps(GOOD).encode(), Content_Length="9999"),
    "a negative length": raw(GOOD, Content_Length="-1"),
    "two lengths": raw(GOOD, Content_Length="10\r\nContent-Length: 12"),
    "malformed chunks": raw(b"zz\r\nhello\r\n", Transfer_Encoding="chunked"),
    "a chunk cut off": raw(b"ff\r\n{", Transfer_Encoding="chunked"),
    "an unknown transfer": raw(GOOD, Transfer_Encoding="rot13"),
    "gzip that was not asked for": raw(gzip.compress(json.dumps(GOOD).encode()), Content_Encoding="gzip"),
    "malformed gzip": raw(b"\x1f\x8b not gzip", Content_Encoding="gzip"),
    "a bomb": raw(gzip.compress(bytes(20_000_000)), Content_Encoding="gzip"),
    "more than a reply can be": raw(b" " * 300_000 + json.dumps(GOOD).encode()),
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "nothing": b"",
    "a malformed status": b"HTTP/1.1 abc OK\r\n\r\n",
    "malformed headers": b"HTTP/1.1 200 OK\r\n\x00\xff: \x01\r\n\r\n{}",
    "headers without end": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 40_000,
    "reset": b"RESET",
    "reset in the body": raw(json.dumps(GOOD).encode(), Content_Length="9999") + b"RESET",
}
# Odd, but the answer is in it.
ANSWER = {
    "good": raw(GOOD),
    "usage missing": raw({k: v for k, v in GOOD.items() if k != "usage"}),
    "usage null": raw(GOOD | {"usage": None}),
    "usage a list": raw(GOOD | {"usage": [1, 2]}),
    "counts null": raw(GOOD | {"usage": dict.fromkeys(USAGE)}),
    "counts of text": raw(GOOD | {"usage": dict.fromkeys(USAGE, "3")}),
    "negative counts": raw(GOOD | {"usage": dict.fromkeys(USAGE, -3)}),
    "huge counts": raw(GOOD | {"usage": dict.fromkeys(USAGE, 10**30)}),
    "a count of true": raw(GOOD | {"usage": dict.fromkeys(USAGE, True)}),
    "another content type": raw(GOOD, kind="text/html; charset=klingon"),
    "no content type": raw(GOOD, kind=""),
    "an unknown finish": raw(GOOD | {"choices": [CHOICE | {"finish_reason": {"why": 1}}]}),
    "a malformed second choice": raw(GOOD | {"choices": [CHOICE, None, 3]}),
    "reasoning of another type": message(reasoning=[1], reasoning_content={"a": 1}, refusal=0),
    "unknown fields": raw(GOOD | {"choices": [CHOICE | {"logprobs": "x"}], "service_tier": [[]]}),
    "chunks": raw(
        b"%x\r\n%s\r\n0\r\n\r\n" % (len(json.dumps(GOOD)), json.dumps(GOOD).encode()),
        Transfer_Encoding="chunked",
    ),
    "status 201": raw(GOOD, "201 Created"),
    "more bytes than it says": raw(GOOD, Content_Length=str(len(json.dumps(GOOD))))
    + b"HTTP/1.1 200 OK\r\n\r\n",
}
UNCOUNTED = {"usage missing", "usage null", "usage a list", "counts null", "counts of text", "negative counts",
             "huge counts", "a count of true"}  # fmt: skip
REFUSED = {"status 400"}  # the server's final answer to a request
KINDS = NO_ANSWER | ANSWER


class BadServer:
    """Answers a request with the reply whose kind its text names (`KIND:<kind>;`); `asked` counts them.

    In a thread of its own. `fixed`: every reply is good.
    """

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.fixed = False
        self.loop = asyncio.new_event_loop()
        self.started = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        assert self.started.wait(30)

    def _run(self) -> None:
        async def serve() -> None:
            self.stop = asyncio.Event()
            server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            self.started.set()
            await self.stop.wait()
            server.close()

        self.loop.run_until_complete(serve())
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(30)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.I)
            assert length
            body = json.loads(await reader.readexactly(int(length[1])))
            kind = re.search(r"KIND:([^;]+);", json.dumps(body))
            assert kind
            self.asked[kind[1]] += 1
            await self._answer("good" if self.fixed else kind[1], writer)
        writer.close()

    async def _answer(self, kind: str, writer: asyncio.StreamWriter) -> None:
        if kind in SLOW:
            await SLOW[kind](writer)
            return
        reply = KINDS[kind]
        writer.write(reply.removesuffix(b"RESET"))
        await writer.drain()
        if reply.endswith(b"RESET"):
            # An end without lingering is a reset to the other side.
            writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            writer.transport.abort()


async def trickle(writer: asyncio.StreamWriter, head: bytes, part: bytes, pause: float) -> None:
    """A part after the other until the client has enough."""
    writer.write(head)
    while not writer.is_closing():
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(pause)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
SLOW: dict[str, Callable[[asyncio.StreamWriter], Any]] = {
    "silence": lambda writer: trickle(writer, b"", b"", 0.1),
    "a byte at a time": lambda writer: trickle(writer, HEAD + b"Content-Length: 9999\r\n\r\n", b" ", 0.05),
    "a header at a time": lambda writer: trickle(writer, b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.05),
    "wait a little more": lambda writer: trickle(writer, b"", b"HTTP/1.1 102 Processing\r\n\r\n", 0.05),
    "a body without end": lambda writer: trickle(writer, HEAD + b"\r\n", b" " * 65_536, 0),
    "chunks without end": lambda writer: trickle(
        writer, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"ffff\r\n" + b" " * 65_535 + b"\r\n", 0
    ),
    "a failure without end": lambda writer: trickle(
        writer, HEAD.replace(b"200", b"500") + b"\r\n", b"x" * 65_536, 0
    ),
}


@pytest.fixture(scope="module")
def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BadServer]:
    """A bad server, and clients that try twice at once and take less than a real reply can be."""
    quick = partial(chat_client.Server, tries=2, first_wait_s=0.001, longest_wait_s=0.001)
    monkeypatch.setattr(chat_client, "Server", quick)
    monkeypatch.setattr(chat_client, "MOST_BYTES", 250_000)
    bad = BadServer()
    yield bad
    bad.close()


def test_there_are_kinds_enough() -> None:
    assert len(NO_ANSWER) + len(SLOW) >= 60 and not set(NO_ANSWER) & set(ANSWER)


def test_an_evaluation_resumes(
    server: BadServer,
    picture: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(asking, "MOST_FAILURES", len(KINDS))
    rows = [
        {
            "id": kind,
            "question": f"KIND:{kind};",
            "answer": "yes",
            "image": base64.b64encode(picture).decode(),
        }
        for kind in KINDS
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bad.yaml").write_text(
        f"{{title: Bad, files: rows.jsonl, folder: '{tmp_path}', rows: 1, licence: none, prompt: '{{question}}', "
        "answer_type: yes/no, official_rule: none, columns: {id: [id], question: question, answer: answer, "
        "image: image}}"
    )
    overrides = [
        "model=m", f"benchmarks=[{tmp_path / 'bad.yaml'}]", f"endpoint={server.url}", f"out={tmp_path}", "timeout=60",
    ]  # fmt: skip
    assert evaluate.main(overrides) == 1
    out, err = capsys.readouterr()
    assert f"{len(NO_ANSWER)} questions got no answer" in out and "\x1b" not in out and "Traceback" not in err
    file = tmp_path / "m" / "bad" / "records.jsonl"
    records = {record.id: record for record in read_answers(file).records}
    assert set(records) == set(ANSWER)
    assert all(record.correct and record.response == "Answer: yes" for record in records.values())
    assert {kind for kind, record in records.items() if record.response_tokens is None} == UNCOUNTED
    server.asked.clear()
    server.fixed = True
    assert evaluate.main(overrides) == 0
    assert set(server.asked) == set(NO_ANSWER)
    assert {record.id for record in read_answers(file).records} == set(KINDS)


def ask_of(kind: str, number: int = 0) -> judge.Ask:
    return judge.Ask(f"{kind} {number}", "full", "Which?", "red", f"KIND:{kind};{number}")


def test_a_judge_resumes(server: BadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "MOST_FAILURES", len(KINDS))
    asks, file = {kind: ask_of(kind) for kind in KINDS}, tmp_path / "judge.jsonl"

    def run(model: str = "j") -> list[str]:
        left = judge.unanswered(asks.values(), "strict", judge.read_replies(file, model))
        return asyncio.run(judge.judge(server.url, model, left, file, 16, 60, lambda: None))

    def states(scorer: str) -> dict[str, str]:
        replies = judge.read_replies(file, "j")
        return {kind: judge.state(replies.get(ask.key), scorer) for kind, ask in asks.items()}

    assert len(run()) == len(NO_ANSWER)
    assert states("strict") == {kind: "right" if kind in ANSWER else "failed" for kind in KINDS}
    assert "right" not in states("official").values()  # it says "Answer: yes", which is not exactly yes
    server.asked.clear()
    server.fixed = True
    assert run() == [] and set(server.asked) == set(NO_ANSWER)
    assert set(states("strict").values()) == {"right"}
    assert judge.read_replies(file, "another judge") == {}
    assert run("another judge") == [] and server.asked["good"] == 1


def test_a_judge_that_is_gone_is_not_asked_for_ever(server: BadServer, tmp_path: Path) -> None:
    asks = [ask_of("status 404", number) for number in range(200)]
    failures = asyncio.run(judge.judge(server.url, "j", asks, tmp_path / "judge.jsonl", 4, 60, lambda: None))
    assert judge.MOST_FAILURES <= len(failures) <= judge.MOST_FAILURES + 4


def test_a_synthesis_resumes(
    server: BadServer, picture: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesis, "UNANSWERED_IN_A_ROW", len(KINDS))
    monkeypatch.setattr(chat_client, "Server", chat_client.Server.func)  # type: ignore[attr-defined]
    (tmp_path / "a.png").write_bytes(picture)
    requests = [synthesis.Request(kind, tmp_path / "a.png", f"KIND:{kind};", 0.0) for kind in KINDS]
    settings = OmegaConf.merge(
        OmegaConf.structured(ServerSettings),
        {"base_url": server.url, "model": "m", "tries": 2, "first_wait_s": 0.001, "longest_wait_s": 0.001},
    )

    async def go(journal: Journal) -> list[str]:
        async with synthesis.Client(settings, seed=0) as client:
            return await synthesis.ask_all(client, requests, lambda _, text: {"text": text}, journal, "test")

    with Journal(tmp_path / "a.jsonl") as journal:
        unanswered = asyncio.run(go(journal))
        assert len(unanswered) == len(NO_ANSWER) - len(REFUSED)
        assert {kind for kind, record in journal.records.items() if record["reason"] is None} == set(ANSWER)
        assert {kind for kind, record in journal.records.items() if record["reason"]} == REFUSED
    server.asked.clear()
    server.fixed = True
    with Journal(tmp_path / "a.jsonl") as journal:
        assert asyncio.run(go(journal)) == []
        assert set(server.asked) == set(NO_ANSWER) - REFUSED and set(journal.records) == set(KINDS)


def test_no_reply_takes_more_than_its_time_or_its_bytes(server: BadServer) -> None:
    async def go() -> list[BaseException | chat_client.Completion]:
        async with chat_client.Server(server.url, timeout_s=0.6) as client:
            asked = [client.complete({"messages": f"KIND:{kind};"}) for kind in SLOW]
            return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 60)

    ends = dict(zip(SLOW, asyncio.run(go()), strict=True))
    assert {kind: type(end).__mro__[-3] for kind, end in ends.items()} == dict.fromkeys(SLOW, Exception)
    for kind, end in ends.items():
        assert isinstance(end, NoAnswerError)
        if "without end" in kind:
            assert str(end) in ("the reply is longer than 250000 bytes", "no whole reply within 0.6 s"), kind
        else:
            assert str(end) == "no whole reply within 0.6 s", kind
            assert server.asked[kind] == 2  # tried again


# ---- addresses, proxies, keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["localhost:8000/v1", "ftp://localhost/v1", "http://", "http:///v1", "http://[::1", "http://a b/v1", "",
     "http://host:port/v1", "http://host/v1?a=b", "file:///etc/passwd", "http://\x00/v1"],
)  # fmt: skip
def test_an_address_that_is_none_is_a_sentence(url: str) -> None:
    with pytest.raises(UserError, match="not the address of a server"):
        chat_client.Server(url, 1)


def test_a_password_in_an_address_is_not_shown() -> None:
    assert chat_client.Server("http://me:secret@127.0.0.1:1/v1", 1).name == "http://127.0.0.1:1/v1"


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "nonsense://x", "http://["])
def test_no_proxy_stands_before_this_machine(
    server: BadServer, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.setenv("NO_PROXY", "example.org")

    async def go() -> str:
        async with chat_client.Server(server.url, 60) as client:
            return (await client.complete({"messages": "KIND:good;"})).text

    assert asyncio.run(go()) == "Answer: yes"


@pytest.mark.parametrize("host", ["localhost", "127.8.9.1", "[::1]", "0.0.0.0", "judge.localhost"])
def test_this_machine_has_many_names(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "nonsense://x")
    chat_client.Server(f"http://{host}:8000/v1", 1)


@pytest.mark.parametrize(
    ("proxy", "sentence"),
    [
        ("socks5://127.0.0.1:9", "install socksio, or unset ALL_PROXY, or put example.org into NO_PROXY"),
        ("nonsense://x", "fix HTTP_PROXY, HTTPS_PROXY, ALL_PROXY"),
        ("http://host:port", "fix HTTP_PROXY, HTTPS_PROXY, ALL_PROXY"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_a_sentence(
    proxy: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "HTTP_PROXY",
        "http_proxy",
        "HTTPS_PROXY",
        "https_proxy",
        "NO_PROXY",
        "no_proxy",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(UserError, match=sentence):
        chat_client.Server("http://example.org/v1", 1)


@pytest.mark.parametrize("key", ["a\nb", " a", "schlüssel", "a\x00"])
def test_a_key_that_cannot_be_sent_is_a_sentence(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {"OPENAI_API_KEY": key})
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        chat_client.Server("http://127.0.0.1:1/v1", 1)


# ---- bodies and headers of any kind --------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["choices", "message", "content", "usage", "finish_reason"]), inner)
    ),
    max_leaves=12,
)


@given(JSON.map(lambda value: json.dumps(value).encode()) | st.binary())
def test_any_body_is_an_answer_or_a_sentence(content: bytes) -> None:
    with suppress(NoAnswerError):
        found = read_completion(content)
        assert isinstance(found.text, str)
        assert found.response_tokens is None or found.response_tokens >= 0


@given(st.integers(0, len(json.dumps(GOOD)) - 1))
def test_a_body_cut_anywhere_is_a_sentence(cut: int) -> None:
    with pytest.raises(NoAnswerError, match="not a chat completion"):
        read_completion(json.dumps(GOOD).encode()[:cut])


@given(st.text())
def test_any_header_is_a_time_within_bounds_or_none(value: str) -> None:
    seconds = retry_after(value)
    assert seconds is None or 0 <= seconds <= 600


def test_retry_after_reads_both_forms() -> None:
    assert retry_after("7") == 7 and retry_after("1e9") == 600 and retry_after("-3") == 0
    moment = datetime.now(UTC) + timedelta(seconds=90)
    assert 80 < (retry_after(format_datetime(moment, usegmt=True)) or 0) <= 90
    assert retry_after("soon") is None and retry_after("") is None
