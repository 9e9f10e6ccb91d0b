"""Once against a real `vllm serve` of the miniature model: the protocol, images included. Its text means little."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from data import synthesize
from data.miniature import world
from data.synthesis.client import Client, Request
from data.synthesis.config import Server
from vopd.common import library_environment
from vopd.config import ROOT
from vopd.evaluation.scoring import is_correct, parse_answer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

MODEL = "miniature"
START_SECONDS = 600
ARGUMENTS = [
    "--served-model-name=" + MODEL,
    "--dtype=bfloat16",
    "--enforce-eager",
    "--no-enable-chunked-prefill",
    "--no-enable-prefix-caching",
    "--mamba-ssm-cache-dtype=float32",
    "--max-model-len=768",
    "--max-num-seqs=8",
    "--max-num-batched-tokens=2048",
    "--kv-cache-memory-bytes=67108864",
    "--skip-mm-profiling",
    "--mm-processor-cache-gb=0",
    "--distributed-executor-backend=uni",
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    model = str(ROOT / "data" / "miniature" / "base")
    command = [
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        model,
        "--host=127.0.0.1",
        f"--port={port}",
        *ARGUMENTS,
    ]
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-P", *command],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **library_environment.variables("cpu")},
        )
    try:
        limit = time.monotonic() + START_SECONDS
        while not healthy(port):
            assert server.poll() is None and time.monotonic() < limit, log.read_text(errors="replace")[-5000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
        assert server.poll() is None, log.read_text(errors="replace")[-5000:]
    finally:
        server.terminate()
        server.wait(60)


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_pictures_arrive_the_model_reads_crops(url: str, tmp_path: Path) -> None:
    """The base model answers 97% of crops rightly; without the picture it could guess a quarter."""
    scenes = [world.scene(0, "test", index) for index in range(24)]
    server = OmegaConf.merge(
        OmegaConf.structured(Server), {"base_url": url, "model": MODEL, "max_tokens": 64, "concurrency": 4}
    )
    for scene in scenes:
        Image.fromarray(scene.crop).save(tmp_path / f"{scene.id}.png")
    requests = [Request(s.id, tmp_path / f"{s.id}.png", s.question, temperature=0.0) for s in scenes]

    async def answers() -> list[str]:
        async with Client(server, seed=0) as client:
            return [(await client.send(request)).text for request in requests]

    texts = asyncio.run(answers())
    right = [
        is_correct(parse_answer(t, "letter", s.options), s.answer, "letter")
        for t, s in zip(texts, scenes, strict=True)
    ]
    assert sum(right) >= 18, texts


def test_the_pipeline_speaks_to_it_and_rejects_what_it_says(
    url: str, overrides_in: Callable[..., list[str]], tmp_path: Path
) -> None:
    overrides = [
        "propose.per_image=2",
        f"server.model={MODEL}",
        "server.max_tokens=64",
        "server.concurrency=4",
        "server.timeout_s=120",
    ]
    assert synthesize.main(overrides_in(tmp_path / "out", url, *overrides)) == 0
    asked = [
        json.loads(line) for line in (tmp_path / "out" / "stages" / "ask.jsonl").read_text().splitlines()
    ]
    assert len(asked) == 6
    # A model that knows two hundred words cannot write the JSON: every reply is a recorded rejection.
    assert {record["reason"] for record in asked} <= {
        "reply is not the JSON asked for",
        "reply cut off at max_tokens",
        "empty reply",
    }
    replied = [record for record in asked if record["reason"] == "reply is not the JSON asked for"]
    assert all(record["tokens"][0] > 200 for record in replied)
    assert "| ask | 6 | 0 |" in (tmp_path / "out" / "datasheet.md").read_text()
