"""What a model's config.json says that a run must fit: the vocabulary, the longest context, the attention heads."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vopd.errors import UserError


def read(model: str) -> dict[str, Any]:
    """The language model's part of a model's config.json, with what stands beside it.

    Args:
        model: a folder, or an id on the hub, of which that one file is fetched.

    Raises:
        UserError: there is no such folder or id, or no readable config.json.
    """
    config = whole(model)
    return {**config, **(config.get("text_config") or {})}


def whole(model: str) -> dict[str, Any]:
    """A model's config.json as it is; arguments and errors as of `read`."""
    file = Path(model) / "config.json" if Path(model).is_dir() else _from_hub(model)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return {**config, "text_config": {**(config.get("text_config") or {})}}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{file}: not readable as a model's settings ({error}).") from error


def _from_hub(model: str) -> Path:
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if isinstance(there := try_to_load_from_cache(model, "config.json"), str):
            return Path(there)
        if not constants.HF_HUB_OFFLINE:
            _find_host(constants.ENDPOINT)
        return Path(hf_hub_download(model, "config.json"))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.path={model}: no such folder, and not available from the hub ({said}); give a model's folder."
        ) from error


def _find_host(address: str) -> None:
    """Raise OSError where the hub's host has no address: its client would try for half a minute.

    A proxy finds hosts by itself.
    """
    if not urllib.request.getproxies():
        socket.getaddrinfo(urlsplit(address).hostname, None)


def check(
    facts: Mapping[str, Any], model: str, least_vocabulary: int, tokens: int, tensor_parallel: int
) -> None:
    """Refuse a run that the model cannot take; a fact that the model does not state is not judged.

    Args:
        facts: as `read` gives them.
        model: its name, for the sentence.
        least_vocabulary: what the method asks for (`Method.least_vocabulary`).
        tokens: longest prompt and response together.
        tensor_parallel: devices that share a layer's heads in the rollout.

    Raises:
        UserError: names the model, its figure and the setting.
    """
    vocabulary = _number(facts, "vocab_size")
    if vocabulary is not None and least_vocabulary > vocabulary:
        raise UserError(
            f"{model}: its vocabulary has {vocabulary:,} entries, and the method needs {least_vocabulary:,} "
            "(method.top_k, where it has one); give fewer."
        )
    context = _number(facts, "max_position_embeddings")
    if context is not None and tokens > context:
        raise UserError(
            f"{model}: takes {context:,} tokens, and rollout.max_prompt_tokens + rollout.max_response_tokens are "
            f"{tokens:,}; give fewer."
        )
    heads = _number(facts, "num_attention_heads")
    if heads is not None and heads % tensor_parallel:
        raise UserError(
            f"{model}: its {heads} attention heads cannot be shared by "
            f"rollout.tensor_parallel={tensor_parallel} devices."
        )


def _number(facts: Mapping[str, Any], name: str) -> int | None:
    value = facts.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
