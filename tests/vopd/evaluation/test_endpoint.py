"""What is asked of a server, and what is made of its reply."""

import asyncio
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from vopd.evaluation.endpoint import Endpoint, Reply, Sampling, messages, opens_reasoning
from vopd.evaluation.scoring import parse_answer

SAMPLING = Sampling(True, 0.0, 1.0, 8, 0)


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def answered(stub: Callable[..., Any], reply: dict[str, Any], **more: Any) -> Reply:
    server = stub(lambda body: reply)
    endpoint = Endpoint(server.url, "stub", SAMPLING, 60, **more)
    return asyncio.run(endpoint.answer("q", "full", picture(), "What?"))


def test_the_sizes_of_a_picture_are_recorded(stub: Callable[..., Any]) -> None:
    reply = answered(stub, {"text": "B"}, resizing=lambda width, height: (2 * width, 2 * height))
    assert (reply.image_in, reply.image_out, reply.text) == ((12, 8), (24, 16), "B")
    assert reply.seconds > 0


def test_a_reasoning_block_that_the_template_opened_is_put_back(stub: Callable[..., Any]) -> None:
    """So that an answer in a thought that was never ended is none."""
    thought = answered(stub, {"text": "The answer is B."}, opens_reasoning=True)
    plain = answered(stub, {"text": "The answer is B."})
    assert thought.text == "<think>\nThe answer is B." and parse_answer(thought.text, "letter").value is None
    assert plain.text == "The answer is B."


@pytest.mark.parametrize(
    ("end", "opened"), [("<think>\n", True), ("<think>\n\n</think>\n\n", False), ("", False)]
)
def test_whether_a_template_opens_the_block(end: str, opened: bool) -> None:
    processor = SimpleNamespace(apply_chat_template=lambda chat, **_: f"user: ?\nassistant: {end}")
    assert opens_reasoning(processor, thinking=True) == opened


def test_the_views_differ_in_their_picture_alone() -> None:
    full, crop = (messages("q", view, "picture", "What?") for view in ("full", "crop"))
    assert full == crop
    assert [part["type"] for part in full[0]["content"]] == ["image", "text"]
