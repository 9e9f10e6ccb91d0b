"""Who answers: an OpenAI-compatible endpoint, or vLLM's engine in this process. Both take a question at a time.

Pictures go as they are published: the endpoint is sent the file's own bytes, vLLM the decoded pixels. A model's
processor may resize them; the size that it makes is worked out by its own rule and recorded with the answer.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf
from PIL import Image

from vopd import loopback, preflight, scratch, vllm_delta_rule
from vopd.backbone.launch import environment
from vopd.errors import UserError
from vopd.evaluation.benchmark import decode
from vopd.seeding import request_seed
from vopd.views import VIEWS, Messages
from vopd.vllm_blocks import clear_used_blocks

RETRIES = 4  # the client waits longer each time; then the question stays unanswered and the next run asks it
GIB = 2**30


# A template that opens the reasoning block itself leaves the response without the opening tag. It is put back, so
# that reasoning which was never closed is not read as an answer.
THINK = "<think>\n"


class NoAnswerError(Exception):
    """A question could not be answered; it is left out of the records and asked again by the next run."""


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
    """One answer. seconds: from being asked to the last token. image_in, image_out: width and height in pixels as
    published and as the model's processor makes them; out is None where its rule is not known here."""

    text: str
    response_tokens: int
    prompt_tokens: int
    truncated: bool
    seconds: float
    image_in: tuple[int, int]
    image_out: tuple[int, int] | None
    reasoning: str | None = None


class Engine(Protocol):
    """What the harness needs of an engine."""

    async def answer(self, key: str, view: str, picture: bytes, prompt: str) -> Reply:
        """Answer one question; NoAnswerError if that fails for this question."""

    def close(self) -> None:
        """Give back what the engine holds."""


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

        out_height, out_width = smart_resize(height, width, **self._limits)
        return out_width, out_height


class Endpoint:
    """Any OpenAI-compatible server. `api_key` is the environment's OPENAI_API_KEY, if there is one."""

    def __init__(self, url: str, model: str, sampling: Sampling, timeout: float) -> None:
        self._client = client(url, timeout)
        self._model, self._sampling = model, sampling
        # A name is the server's own, and says nothing of a processor here.
        self._resizing = Resizing(model) if Path(model).is_dir() else None

    async def answer(self, key: str, view: str, picture: bytes, prompt: str) -> Reply:
        """Ask the server once (with retries)."""
        import openai

        with Image.open(io.BytesIO(picture)) as header:
            size, kind = header.size, Image.MIME[header.format or "PNG"]
        url = f"data:{kind};base64,{base64.b64encode(picture).decode()}"
        sampling = self._sampling
        start = time.perf_counter()
        try:
            completion = await self._client.chat.completions.create(
                model=self._model,
                messages=_for_server(messages(key, view, url, prompt)),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=sampling.seed_for(key),
                extra_body={"chat_template_kwargs": {"enable_thinking": sampling.thinking}},
            )
        except openai.OpenAIError as error:
            raise NoAnswerError(f"{type(error).__name__}: {error}") from error
        seconds = time.perf_counter() - start
        if not completion.choices or completion.usage is None:
            raise NoAnswerError("the server's answer has no choices or no token counts")
        choice, usage = completion.choices[0], completion.usage
        # A server with a reasoning parser hands the reasoning block over apart from the answer.
        extra = choice.message.model_extra or {}
        reasoning = extra.get("reasoning_content") or extra.get("reasoning")
        text, cut = choice.message.content or "", choice.finish_reason == "length"
        # A server does not show its prompt: only a cut response is suspected of being still inside the block.
        if sampling.thinking and cut and not reasoning and "</think>" not in text:
            text = THINK + text
        return Reply(
            text=text,
            response_tokens=usage.completion_tokens,
            prompt_tokens=usage.prompt_tokens,
            truncated=cut,
            seconds=seconds,
            image_in=size,
            image_out=self._resizing(*size) if self._resizing else None,
            reasoning=reasoning,
        )

    def close(self) -> None:
        """Nothing is held."""


def client(url: str, timeout: float) -> Any:
    """An OpenAI client for a server."""
    import openai

    key = os.environ.get("OPENAI_API_KEY", "none")
    return openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=RETRIES, timeout=timeout)


def _for_server(chat: Messages) -> Any:
    """Pictures as the endpoint's protocol wants them."""

    def part(content: Mapping[str, Any]) -> Mapping[str, Any]:
        if content["type"] != "image":
            return content
        return {"type": "image_url", "image_url": {"url": content["image"]}}

    return [{**message, "content": [part(c) for c in message["content"]]} for message in chat]


@dataclass
class _Request:
    prompt: dict[str, Any]
    params: Any
    reply: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop

    def settle(self, outcome: Any) -> None:
        """Hand the outcome to the waiting task, from the engine's thread; nobody waits after an interruption."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._settle, outcome)

    def _settle(self, outcome: Any) -> None:
        if self.reply.done():  # cancelled meanwhile
            return
        if isinstance(outcome, Exception):
            self.reply.set_exception(outcome)
        else:
            self.reply.set_result(outcome)


class LocalEngine:
    """vLLM's engine in this process; one thread feeds and steps it, so that answers arrive one by one."""

    def __init__(self, model: str, sampling: Sampling, concurrency: int, extra: Mapping[str, Any]) -> None:
        import torch

        if Path(model).is_dir():
            preflight.check_model_folder(Path(model))
        place = scratch.for_this_process()
        os.environ.update(loopback.start(place))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        os.environ.update(environment(OmegaConf.create({"hardware": {"device": device}})))
        os.environ.setdefault(
            "VLLM_LOGGING_LEVEL", "ERROR"
        )  # a line for every step would bury the progress bar
        from transformers import logging
        from vllm import LLM, SamplingParams

        logging.set_verbosity_error()

        self._params, self._sampling = SamplingParams, sampling
        self._processor = preflight.load_processor(model)
        self._resizing = Resizing(model)
        if device == "cpu":
            vllm_delta_rule.install()
        self.llm = LLM(**engine_settings(model, device, concurrency, sampling.seed), **extra)
        if device == "cpu":
            self.llm.collective_rpc(lambda worker: clear_used_blocks(worker.model_runner))
        self._failure: UserError | None = None
        self._inbox: queue.Queue[_Request | None] = queue.Queue()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def request(self, key: str, view: str, image: Image.Image, prompt: str) -> tuple[dict[str, Any], Any]:
        """What vLLM is given for a question: prompt and sampling parameters."""
        sampling = self._sampling
        text = self._processor.apply_chat_template(
            messages(key, view, image, prompt),
            add_generation_prompt=True,
            tokenize=False,
            enable_thinking=sampling.thinking,
        )
        params = self._params(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed_for(key),
        )
        return {"prompt": text, "multi_modal_data": {"image": [image]}}, params

    async def answer(self, key: str, view: str, picture: bytes, prompt: str) -> Reply:
        """Queue one question and wait for its answer."""
        image = decode(picture, key)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        start = time.perf_counter()
        if self._failure:
            raise self._failure
        given, params = self.request(key, view, image, prompt)
        self._inbox.put(_Request(given, params, future, loop))
        output = await future
        completion = output.outputs[0]
        return Reply(
            text=(THINK if given["prompt"].rstrip().endswith("<think>") else "") + completion.text,
            response_tokens=len(completion.token_ids),
            prompt_tokens=len(output.prompt_token_ids),
            truncated=completion.finish_reason == "length",
            seconds=time.perf_counter() - start,
            image_in=image.size,
            image_out=self._resizing(*image.size),
        )

    def close(self) -> None:
        """End the thread; the engine goes with the process."""
        self._inbox.put(None)
        self._thread.join(timeout=60)

    def _serve(self) -> None:
        engine = self.llm.llm_engine
        waiting: dict[str, _Request] = {}
        try:
            while self._take(waiting):
                for output in engine.step():
                    if output.finished:
                        waiting.pop(output.request_id).settle(output)
        except Exception as error:  # the thread's boundary: whoever waits must hear of it
            self._failure = UserError(f"vLLM's engine stopped: {type(error).__name__}: {str(error)[:300]}")
            while not self._inbox.empty():
                if late := self._inbox.get():
                    waiting[str(id(late))] = late
            for request in waiting.values():
                request.settle(self._failure)
            raise

    def _take(self, waiting: dict[str, _Request]) -> bool:
        """Hand all queued requests to the engine, waiting for one if it has none; False when told to end."""
        while not waiting or not self._inbox.empty():
            request = self._inbox.get()
            if request is None:
                return False
            try:
                (request_id,) = self.llm.enqueue([request.prompt], [request.params], use_tqdm=False)
                # Outputs carry the id without the random end that vLLM adds inside.
                waiting[request_id.split("-")[0]] = request
            except ValueError as error:  # vLLM's word for a prompt that cannot be served, e.g. too long
                request.settle(NoAnswerError(str(error)))
        return True


def engine_settings(model: str, device: str, concurrency: int, seed: int) -> dict[str, Any]:
    """Arguments of vLLM's LLM; on CPU as the trainer's rollout has them (vopd/backbone/verl_cpu.yaml says why)."""
    common: dict[str, Any] = {
        "model": model,
        "max_num_seqs": concurrency,
        "limit_mm_per_prompt": {"image": 1},
        "mamba_ssm_cache_dtype": "float32",
        "seed": seed,
        "load_format": "safetensors",
        "trust_remote_code": False,
        "worker_extension_cls": "vopd.loopback.Worker",
    }
    if device != "cpu":
        return common
    return common | {
        "dtype": "float32",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": 8192,
        "kv_cache_memory_bytes": GIB // 2,
        "mm_processor_cache_gb": 0,
        "skip_mm_profiling": True,
        "distributed_executor_backend": "uni",
    }
