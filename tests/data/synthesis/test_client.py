"""The client against a real server process's protocol: replies, rejections with reasons, outages and how they end."""

import asyncio
import contextlib
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from pydantic import BaseModel

from data.synthesis import prompts
from data.synthesis.client import Client, RejectedError, Reply, Request, ask_all, read_json
from data.synthesis.config import Server
from data.synthesis.journal import Journal
from vopd.common import chat_client
from vopd.errors import UserError


def server(url: str, **settings: Any) -> Any:
    quick = {"base_url": url, "model": "stub", "first_wait_s": 0.01, "longest_wait_s": 0.05, "timeout_s": 5}
    return OmegaConf.merge(OmegaConf.structured(Server), quick | settings)


def request(photographs: Path, n: int = 0) -> Request:
    return Request(
        f"q{n}", photographs / "coffee.png", prompts.answer("What is the colour of most of it?"), 0.7
    )


def brightest(photographs: Path) -> str:
    """What the stub says of the photograph: it must have come through whole."""
    means = np.asarray(Image.open(photographs / "coffee.png")).mean((0, 1))
    return f"{('red', 'green', 'blue')[means.argmax()]}."


def send(url: str, one: Request, **settings: Any) -> Reply:
    async def go() -> Reply:
        async with Client(server(url, **settings), seed=5) as client:
            return await client.send(one)

    return asyncio.run(go())


def test_a_reply_comes_back_with_its_tokens(stub_server: ModuleType, photographs: Path) -> None:
    with stub_server.StubServer() as stub:
        assert send(stub.url, request(photographs)) == Reply(brightest(photographs), (100, 10))
        body = stub.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("stub", 0.7, 512)
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


def test_seeds_depend_on_the_request_alone(stub_server: ModuleType, photographs: Path) -> None:
    with stub_server.StubServer() as stub:
        for n in (0, 1, 0):
            send(stub.url, request(photographs, n))
        seeds = [body["seed"] for body in stub.bodies]
    assert seeds[0] == seeds[2] != seeds[1]


@pytest.mark.parametrize("fault", ["busy", "broken", "silent", "half_closed"])
def test_an_outage_is_retried(stub_server: ModuleType, photographs: Path, fault: str) -> None:
    with stub_server.StubServer(faults={0: fault}) as stub:
        reply = send(stub.url, request(photographs), timeout_s=1 if fault == "silent" else 5)
        assert reply.text == brightest(photographs)
        assert len(stub.bodies) == 2
        assert stub.bodies[0]["seed"] == stub.bodies[1]["seed"]


def test_retry_after_is_honoured(stub_server: ModuleType, photographs: Path) -> None:
    with stub_server.StubServer(faults={0: "busy"}) as stub:
        send(stub.url, request(photographs))
        waited = stub.moments[1] - stub.moments[0]
    assert waited >= float(stub_server.RETRY_AFTER)  # the back-off alone ends after 0.05 s


@pytest.mark.parametrize("fault", ["busy", "broken", "silent", "half_closed"])
def test_a_lasting_outage_is_raised_after_the_last_try(
    stub_server: ModuleType, photographs: Path, fault: str
) -> None:
    with stub_server.StubServer(faults=dict.fromkeys(range(9), fault)) as stub:
        with pytest.raises(chat_client.OutageError):
            send(stub.url, request(photographs), tries=2, timeout_s=1 if fault == "silent" else 5)
        assert len(stub.bodies) == 2


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("refusal", "the model refused"),
        ("cut_off", "reply cut off at max_tokens"),
        ("too_long", "request refused with status 400"),
    ],
)
def test_a_useless_reply_is_a_reason_and_not_asked_again(
    stub_server: ModuleType, photographs: Path, fault: str, reason: str
) -> None:
    with stub_server.StubServer(faults={0: fault}) as stub:
        with pytest.raises(RejectedError, match=reason):
            send(stub.url, request(photographs))
        assert len(stub.bodies) == 1


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("no_protocol", 'not a chat completion .*begins \'{"id"'),
        ("other_shape", "choices: Field required"),
        ("unknown_model", "status 404: .*no such model.*check the server's address, the model's name"),
    ],
)
def test_what_is_no_reply_is_a_sentence_and_left_for_the_next_run(
    stub_server: ModuleType, photographs: Path, fault: str, sentence: str
) -> None:
    with stub_server.StubServer(faults={0: fault}) as stub:
        with pytest.raises(chat_client.NoAnswerError, match=sentence):
            send(stub.url, request(photographs))
        assert len(stub.bodies) == 1


def ask(
    url: str, requests: list[Request], path: Path, **settings: Any
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    async def go(journal: Journal) -> list[str]:
        async with Client(server(url, **settings), seed=5) as client:
            return await ask_all(client, requests, lambda _, text: {"text": text}, journal, "test")

    with Journal(path) as journal:
        return asyncio.run(go(journal)), journal.records


def test_concurrency_is_bounded_and_used(stub_server: ModuleType, photographs: Path, tmp_path: Path) -> None:
    requests = [request(photographs, n) for n in range(12)]
    with stub_server.StubServer(delay_s=0.05) as stub:
        ask(stub.url, requests, tmp_path / "a.jsonl", concurrency=4)
        assert stub.most_busy == 4
    with stub_server.StubServer(delay_s=0.01) as stub:
        ask(stub.url, requests, tmp_path / "b.jsonl", concurrency=1)
        assert stub.most_busy == 1


def test_what_stays_unanswered_is_asked_again_and_nothing_else(
    stub_server: ModuleType, photographs: Path, tmp_path: Path
) -> None:
    requests = [request(photographs, n) for n in range(6)]
    with stub_server.StubServer(faults={1: "broken", 3: "too_long"}) as stub:
        unanswered, records = ask(
            stub.url, requests, tmp_path / "a.jsonl", concurrency=1, tries=1, timeout_s=5
        )
        assert len(unanswered) == 1 and sorted(records) == ["q0", "q2", "q3", "q4", "q5"]
        assert records["q3"]["reason"] == "request refused with status 400"
        before = len(stub.bodies)
        unanswered, records = ask(stub.url, requests, tmp_path / "a.jsonl", concurrency=1)
        assert (unanswered, len(stub.bodies) - before, len(records)) == ([], 1, 6)


def test_a_server_that_is_down_ends_the_stage(photographs: Path, tmp_path: Path) -> None:
    requests = [request(photographs, n) for n in range(40)]
    began = time.monotonic()
    with pytest.raises(UserError, match="start the server and run the same command again"):
        ask("http://127.0.0.1:9/v1", requests, tmp_path / "a.jsonl", tries=1)
    assert time.monotonic() - began < 60 and (tmp_path / "a.jsonl").read_bytes() == b""


class Shape(BaseModel):
    """What these replies should be."""

    valid: bool


@pytest.mark.parametrize("text", ['{"valid": true}', 'Sure!\n```json\n{"valid": true}\n```\nDone {x}'])
def test_json_is_found_among_words(text: str) -> None:
    assert read_json(text, Shape).valid


@pytest.mark.parametrize("text", ['{"valid": true', "valid: true", "{}", "[" * 9999, ""])
def test_other_text_is_rejected(text: str) -> None:
    with pytest.raises(RejectedError, match="not the JSON asked for"):
        read_json(text, Shape)


def test_a_refusal_in_words_is_told_from_broken_json() -> None:
    with pytest.raises(RejectedError, match="the model refused"):
        read_json("I'm sorry, but I cannot help with this image.", Shape)


@given(st.text())
def test_any_text_is_read_or_rejected(text: str) -> None:
    with contextlib.suppress(RejectedError):
        assert isinstance(read_json(text, Shape), Shape)
