"""A `vllm serve` of one model for as long as an evaluation lasts: the same server that a user would start by hand.

It listens at a Unix socket in a temporary folder of its own, so no port is taken or open, and ends with the evaluation,
however that ends. On CPU it has the settings and the patches of the training's rollout (`verl_cpu.yaml` says why),
loaded by vLLM itself in the process that computes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from vopd.common import environment_checks, library_environment, loopback, model_folder, processes, temporary
from vopd.common.failures import from_engine_log, one_line
from vopd.errors import UserError

GIB = 2**30
URL = "http://vllm/v1"
"""The address of a server that is reached through its socket."""
LOOK_SECONDS, END_SECONDS = 0.2, 20.0
LOG_BYTES = 1 << 20
COMMAND = ("-m", "vllm.entrypoints.cli.main", "serve")


@contextmanager
def started(model: str, concurrency: int, seed: int, extra: Mapping[str, Any], log: Path) -> Iterator[Path]:
    """The socket of a server of `model` that answers; it is ended after the block.

    Args:
        model: a Hugging Face folder or hub id.
        concurrency: requests that are computed at a time.
        seed: of the engine.
        extra: further options of `vllm serve`, such as {"tensor_parallel_size": 4}.
        log: file to which the server's output is appended.

    Raises:
        UserError: there is no such model, the server did not start, or it ended within the block; says the cause.
    """
    check_model(model)
    device = device_here()
    with temporary.scratch() as place, log.open("ab") as output:
        begin, socket = output.tell(), place / "vllm"
        options = flags(settings(device, concurrency, seed) | dict(extra))
        variables = (
            library_environment.variables(device) | temporary.environment(place) | loopback.start(place)
        )
        server = subprocess.Popen(
            [sys.executable, "-P", *COMMAND, model, f"--uds={socket}", *options],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=os.environ | variables,
            preexec_fn=processes.die_with_parent, start_new_session=True,
        )  # fmt: skip
        reaper = processes.reaper(f"{temporary.VARIABLE}={place}")
        try:
            _wait(server, socket)
            yield socket
        except Exception as error:
            if server.poll() is None:
                raise
            said = from_engine_log(_end(log, begin)) or f"it ended with code {server.returncode}"
            raise UserError(f"vLLM stopped with model={model} ({one_line(said)}); see {log}.") from error
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(END_SECONDS)
            reaper.communicate()  # which ends what is left


class _EndedError(Exception):
    """The server is gone before it answered."""


def _wait(server: subprocess.Popen[bytes], socket: Path) -> None:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), timeout=5.0) as client:
        while server.poll() is None:
            try:
                if client.get("http://vllm/health").is_success:
                    return
            except httpx.HTTPError:  # not yet
                pass
            time.sleep(LOOK_SECONDS)
    raise _EndedError


def _end(log: Path, begin: int) -> str:
    """What was written since `begin`, the end of it."""
    with log.open("rb") as file:
        file.seek(max(begin, file.seek(0, os.SEEK_END) - LOG_BYTES))
        return file.read().decode(errors="replace")


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options of `vllm serve` on a command line: True is --name, False --no-name, None is left out, others are JSON."""
    found = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            found.append(f"--{flag}={value if isinstance(value, str) else json.dumps(value)}")
    return found


def settings(device: str, concurrency: int, seed: int) -> dict[str, Any]:
    """Options of `vllm serve`; on CPU as the trainer's rollout has them."""
    common: dict[str, Any] = {
        "max_num_seqs": concurrency,
        "limit_mm_per_prompt": {"image": 1},
        "mamba_ssm_cache_dtype": "float32",
        "seed": seed,
        "load_format": "safetensors",
        # Sampling is as asked, not as a model's own generation_config.json says.
        "generation_config": "vllm",
        "disable_uvicorn_access_log": True,
        "worker_extension_cls": "vopd.common.loopback.Worker",
    }
    if device != "cpu":
        return common
    return common | {
        "worker_extension_cls": "vopd.backbone.cpu.patches.ServingWorker",
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


def device_here() -> str:
    """`cuda` where an NVIDIA driver shows a device, else `cpu`."""
    return "cuda" if environment_checks.cuda_devices() else "cpu"


def check_model(model: str) -> None:
    """Refuse a folder that is not a whole model, and an id that the hub (or its cache here) does not have."""
    if Path(model).is_dir():
        model_folder.check(Path(model))
        return
    from huggingface_hub import hf_hub_download

    try:
        # A CPU machine works offline, as in training: what is not in the hub's cache here is not fetched.
        hf_hub_download(model, "config.json", local_files_only=device_here() == "cpu")
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise UserError(
            f"model={model}: neither a folder here nor a model that could be fetched ({one_line(str(error))})."
        ) from error
