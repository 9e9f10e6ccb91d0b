"""Who answers: an OpenAI-compatible server, asked a question at a time.

It is shown the pixels that training would see (vopd/common/images.py): it is sent the published file where that decodes
to them anywhere, else a PNG of them. A model's processor may resize them; the size that it makes is worked out by its
own rule and recorded with the answer.
"""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vopd.common import chat_client, control_tokens, images
from vopd.common.seeding import request_seed
from vopd.evaluation.benchmark import PICTURES
from vopd.views import VIEWS, Messages

# A template that opens the reasoning block itself leaves the response without the opening tag. It is put back, so
# that reasoning which was never closed is not read as an answer.
THINK = "<think>\n"


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; temperature 0 is greedy."""

    thinking: bool
    temperature: float
    top_p: float
    max_tokens: int
    seed: int

    def seed_for(self, key: str) -> int | None:
        """A question's own seed; None when greedy."""
        return request_seed(self.seed, 0, key, 0) if self.temperature else None


@dataclass(frozen=True)
class Reply:
    """One answer. Token counts are None where a server gives none. seconds: from being asked to the last token.
    image_in, image_out: width and height in pixels as shown and as the model's processor makes them; out is None where
    its rule is not known here."""

    text: str
    response_tokens: int | None
    prompt_tokens: int | None
    truncated: bool
    seconds: float
    image_in: tuple[int, int]
    image_out: tuple[int, int] | None
    reasoning: str | None = None


def messages(key: str, view: str, picture: object, prompt: str) -> Messages:
    """The chat messages of a question in a view."""
    return VIEWS[view]({"id": key, "image": picture, "crop": picture, "question": prompt})


class Resizing:
    """The size a model's processor gives a picture, by its own rule; None for a rule other than Qwen2-VL's."""

    def __init__(self, model: str) -> None:
        self._limits: Mapping[str, int] | None = None
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
        if type(processor).__name__.startswith("Qwen2VL"):
            size = processor.size
            self._limits = {
                "factor": processor.patch_size * processor.merge_size,
                "min_pixels": size["shortest_edge"],
                "max_pixels": size["longest_edge"],
            }

    def __call__(self, width: int, height: int) -> tuple[int, int] | None:
        if self._limits is None:
            return None
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        try:
            out_height, out_width = smart_resize(height, width, **self._limits)
        except ValueError:  # a strip that the rule has no size for; a server may have answered all the same
            return None
        return out_width, out_height


def resizing_if_known(model: str) -> Resizing | None:
    """The rule of a model folder's processor. A name is the server's own, and says nothing of a processor here."""
    with suppress(OSError, ValueError):  # a folder without one
        return Resizing(model) if Path(model).is_dir() else None
    return None


def tokens_if_known(model: str) -> re.Pattern[str]:
    """What no text for a model may hold: with its own special tokens where it is a folder with a tokenizer."""
    from transformers import AutoTokenizer

    with suppress(OSError, ValueError):
        if Path(model).is_dir():
            return control_tokens.pattern(AutoTokenizer.from_pretrained(model, trust_remote_code=False))
    return control_tokens.pattern()


def opens_reasoning(processor: Any, thinking: bool) -> bool:
    """Whether a model's chat template ends a prompt inside the reasoning block."""
    text = processor.apply_chat_template(
        messages("id", "full", None, "?"),
        add_generation_prompt=True,
        tokenize=False,
        enable_thinking=thinking,
    )
    return bool(text.rstrip().endswith(THINK.strip()))


class Endpoint:
    """Any OpenAI-compatible server (`vopd.common.chat_client`).

    Args:
        url: its base address.
        model: the name it knows the model by.
        sampling: how answers are drawn.
        timeout: seconds for one try.
        resizing: the size that the model's processor gives a picture, where that is known here.
        opens_reasoning: whether the model's chat template ends a prompt inside the reasoning block.
        socket: where the server listens, if at no port.
        tokens: what no text may hold (`vopd/common/control_tokens.py`), the model's own special tokens where its
            tokenizer is known.
    """

    def __init__(
        self,
        url: str,
        model: str,
        sampling: Sampling,
        timeout: float,
        resizing: Resizing | None = None,
        opens_reasoning: bool = False,
        socket: Path | None = None,
        tokens: re.Pattern[str] | None = None,
    ) -> None:
        self._server = chat_client.Server(url, timeout, socket=socket)
        self._model, self._sampling = model, sampling
        self._resizing, self._opens_reasoning = resizing, opens_reasoning
        self._tokens = tokens or control_tokens.pattern()

    def request(
        self, key: str, view: str, picture: bytes, prompt: str
    ) -> tuple[dict[str, Any], tuple[int, int]]:
        """A question's request body, and the picture's size as shown."""
        url, size = _data_url(picture)
        sampling = self._sampling
        body = {
            "model": self._model,
            "messages": _for_server(
                control_tokens.escape_messages(messages(key, view, url, prompt), self._tokens)
            ),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "chat_template_kwargs": {"enable_thinking": sampling.thinking},
        }
        seed = sampling.seed_for(key)
        return (body if seed is None else body | {"seed": seed}), size

    async def answer(self, key: str, view: str, picture: bytes, prompt: str) -> Reply:
        """Ask the server once (with retries); NoAnswerError without an answer, PictureError for a bad picture."""
        body, size = await asyncio.to_thread(self.request, key, view, picture, prompt)
        start = time.perf_counter()
        completion = await self._server.complete(body)
        seconds = time.perf_counter() - start
        text, cut = completion.text, completion.finish_reason == "length"
        # Where the template is not known, only a cut response is suspected of being still inside the block.
        suspected = self._sampling.thinking and cut and not completion.reasoning and "</think>" not in text
        if self._opens_reasoning or suspected:
            text = THINK + text
        return Reply(
            text=text,
            response_tokens=completion.response_tokens,
            prompt_tokens=completion.prompt_tokens,
            truncated=cut,
            seconds=seconds,
            image_in=size,
            image_out=self._resizing(*size) if self._resizing else None,
            reasoning=completion.reasoning,
        )


def _data_url(picture: bytes) -> tuple[str, tuple[int, int]]:
    """A picture as a request holds it, and its size as shown; no pixels are kept while the answer is waited for."""
    file = images.portable(picture, PICTURES)
    return f"data:{file.media};base64,{base64.b64encode(file.content).decode()}", file.shown.size


def _for_server(chat: Messages) -> Any:
    """Pictures as the endpoint's protocol wants them."""

    def part(content: Mapping[str, Any]) -> Mapping[str, Any]:
        if content["type"] != "image":
            return content
        return {"type": "image_url", "image_url": {"url": content["image"]}}

    return [{**message, "content": [part(c) for c in message["content"]]} for message in chat]
