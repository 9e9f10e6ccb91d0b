"""The thread that feeds vLLM's engine, with a stand-in for vLLM: order, refusals, a crash, the end."""

import asyncio
import io
import queue
import threading
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from vopd.errors import UserError
from vopd.evaluation.engines import LocalEngine, NoAnswerError, Sampling, messages
from vopd.evaluation.scoring import parse_answer


class FakeVLLM:
    """Finishes one request a step, the newest first; as vLLM does, it hands out ids with a random end."""

    def __init__(self, crash_after: int | None = None) -> None:
        self.llm_engine = self
        self.ids, self.running, self.steps = count(), [], 0
        self.crash_after = crash_after

    def enqueue(self, prompts: list[dict], params: list[Any], use_tqdm: bool) -> list[str]:
        if "too long" in prompts[0]["prompt"]:
            raise ValueError("The prompt is longer than the model allows.")
        self.running.append((str(next(self.ids)), prompts[0]["prompt"]))
        return [f"{self.running[-1][0]}-ab12-x"]

    def step(self) -> list[Any]:
        self.steps += 1
        if self.crash_after is not None and self.steps > self.crash_after:
            raise RuntimeError("CPU Generator does not use offset")
        request_id, prompt = self.running.pop()
        completion = SimpleNamespace(text=f"said: {prompt}", token_ids=[1, 2, 3], finish_reason="length")
        return [
            SimpleNamespace(
                request_id=request_id, finished=True, outputs=[completion], prompt_token_ids=[0] * 7
            )
        ]


def engine_on(vllm: FakeVLLM) -> LocalEngine:
    engine = object.__new__(LocalEngine)
    engine.llm = vllm
    engine._sampling = Sampling(False, 0.0, 1.0, 8, 0)
    engine._params = lambda **given: given
    engine._processor = SimpleNamespace(apply_chat_template=lambda chat, **_: chat[0]["content"][1]["text"])
    engine._resizing = lambda width, height: (2 * width, 2 * height)
    engine._failure, engine._inbox = None, queue.Queue()
    engine._thread = threading.Thread(target=engine._serve, daemon=True)
    engine._thread.start()
    return engine


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8)).save(buffer, "PNG")
    return buffer.getvalue()


async def all_of(engine: LocalEngine, prompts: list[str]) -> list[Any]:
    asked = [engine.answer(f"q{i}", "full", picture(), prompt) for i, prompt in enumerate(prompts)]
    return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), timeout=30)


def test_each_answer_reaches_the_one_who_asked() -> None:
    engine = engine_on(FakeVLLM())
    replies = asyncio.run(all_of(engine, [f"prompt {i}" for i in range(20)]))
    assert [r.text for r in replies] == [f"said: prompt {i}" for i in range(20)]
    first = replies[0]
    assert (first.response_tokens, first.prompt_tokens, first.truncated) == (3, 7, True)
    assert (first.image_in, first.image_out) == ((12, 8), (24, 16))
    assert first.seconds > 0
    engine.close()
    assert not engine._thread.is_alive()


def test_a_reasoning_block_that_the_template_opened_is_put_back() -> None:
    engine = engine_on(FakeVLLM())
    (thought, plain) = asyncio.run(all_of(engine, ["What?<think>\n", "What?<think>\n\n</think>\n\n"]))
    assert thought.text.startswith("<think>\nsaid") and plain.text.startswith("said")
    assert (
        parse_answer(thought.text.replace("said: What?<think>", "The answer is B."), "letter").value is None
    )
    engine.close()


def test_a_prompt_that_vllm_refuses_is_one_question_without_an_answer() -> None:
    engine = engine_on(FakeVLLM())
    replies = asyncio.run(all_of(engine, ["a", "too long", "b"]))
    assert isinstance(replies[1], NoAnswerError) and "longer than the model allows" in str(replies[1])
    assert [replies[0].text, replies[2].text] == ["said: a", "said: b"]
    engine.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_crash_of_the_engine_reaches_everyone_who_waits_or_asks_later() -> None:
    engine = engine_on(FakeVLLM(crash_after=2))
    replies = asyncio.run(all_of(engine, [f"prompt {i}" for i in range(6)]))
    failed = [r for r in replies if isinstance(r, UserError)]
    assert len(failed) == 4 and "CPU Generator does not use offset" in str(failed[0])
    (late,) = asyncio.run(all_of(engine, ["late"]))
    assert isinstance(late, UserError)


def test_the_views_differ_in_their_picture_alone() -> None:
    full, crop = (messages("q", view, "picture", "What?") for view in ("full", "crop"))
    assert full == crop
    assert [part["type"] for part in full[0]["content"]] == ["image", "text"]
