"""Who answers: an OpenAI-compatible endpoint, or vLLM's engine in this process. Both take a question at a time.

Both are shown the pixels that training would see (vopd/common/images.py): vLLM is given them, an endpoint is sent the
published file where it decodes to them anywhere, else a PNG of them. A model's processor may resize them; the size that
it makes is worked out by its own rule and recorded with the answer.
"""

from __future__ import annotations

import asyncio
import base64
import os
import queue
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf
from PIL import Image

from vopd.backbone.cpu import vllm_delta_rule
from vopd.backbone.cpu.vllm_blocks import clear_used_blocks
from vopd.backbone.launch import environment
from vopd.common import chat_client as chat
from vopd.common import images, loopback, model_folder, temporary
from vopd.common.chat_client import NoAnswerError
from vopd.common.seeding import request_seed
from vopd.errors import UserError
from vopd.evaluation.benchmark import PICTURES
from vopd.views import VIEWS, Messages

GIB = 2**30


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


class Engine(Protocol):
    """What the harness needs of an engine."""

    async def answer(self, key: str, view: str, picture: bytes, prompt: str) -> Reply:
        """Answer one question; NoAnswerError if that fails for this question, PictureError for a bad picture."""

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

        try:
            out_height, out_width = smart_resize(height, width, **self._limits)
        except ValueError:  # a strip that the rule has no size for; a server may have answered all the same
            return None
        return out_width, out_height


class Endpoint:
    """Any OpenAI-compatible server (`vopd.common.chat_client`)."""

    def __init__(self, url: str, model: str, sampling: Sampling, timeout: float) -> None:
        self._server = chat.Server(url, timeout)
        self._resizing: Resizing | None = None
        self._model, self._sampling = model, sampling
        # A name is the server's own, and says nothing of a processor here; so does a folder without one.
        with suppress(OSError, ValueError):
            self._resizing = Resizing(model) if Path(model).is_dir() else None

    async def answer(self, key: str, view: str, picture: bytes, prompt: str) -> Reply:
        """Ask the server once (with retries)."""
        url, size = await asyncio.to_thread(_data_url, picture)
        sampling = self._sampling
        body = {
            "model": self._model,
            "messages": _for_server(messages(key, view, url, prompt)),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "chat_template_kwargs": {"enable_thinking": sampling.thinking},
        }
        if (seed := sampling.seed_for(key)) is not None:
            body["seed"] = seed
        start = time.perf_counter()
        completion = await self._server.complete(body)
        seconds = time.perf_counter() - start
        text, cut = completion.text, completion.finish_reason == "length"
        # A server does not show its prompt: only a cut response is suspected of being still inside the block.
        if sampling.thinking and cut and not completion.reasoning and "</think>" not in text:
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

    def close(self) -> None:
        """Nothing is held."""


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
            model_folder.check(Path(model))
        place = temporary.for_this_process()
        os.environ.update(loopback.start(place))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        os.environ.update(environment(OmegaConf.create({"hardware": {"device": device}})))
        os.environ.setdefault(
            "VLLM_LOGGING_LEVEL", "ERROR"
        )  # a line for every step would bury the progress bar
        _check_model(model)
        from transformers import logging

        logging.set_verbosity_error()
        try:
            self._processor = model_folder.load_processor(model)
            self._resizing = Resizing(model)
        except (OSError, ValueError) as error:
            raise UserError(
                f"model={model}: has no processor that can be loaded ({_first_line(error)})."
            ) from error
        from vllm import LLM, SamplingParams

        self._params, self._sampling = SamplingParams, sampling
        if device == "cpu":
            vllm_delta_rule.install()
        try:
            self.llm = LLM(**{**engine_settings(model, device, concurrency, sampling.seed), **extra})
        except (
            OSError,
            ValueError,
            TypeError,
            RuntimeError,
        ) as error:  # vLLM has no error of its own for this
            said = f"{type(error).__name__}: {_first_line(error)}"
            raise UserError(
                f"vLLM did not start with model={model} ({said}); see the lines above."
            ) from error
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
        image = await asyncio.to_thread(images.decode, picture, PICTURES)
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


def _check_model(model: str) -> None:
    """Refuse a folder that is no whole model, and an id that the hub (or its cache here) does not have."""
    if Path(model).is_dir():
        model_folder.check(Path(model))
        return
    import httpx
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(model, "config.json")
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise UserError(
            f"model={model}: neither a folder here nor a model that could be fetched ({_first_line(error)})."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


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
        "worker_extension_cls": "vopd.common.loopback.Worker",
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
