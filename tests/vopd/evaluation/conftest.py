"""Each benchmark's files in their published layout, three or so rows each with generated pictures; a stub server."""

import base64
import csv
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from data import schema
from data.miniature import prepare

COLOURS = ("red", "blue", "green", "yellow")


def picture(index: int, kind: str = "JPEG") -> bytes:
    """A generated picture, another one for each index."""
    buffer = io.BytesIO()
    Image.new("RGB", (60 + 7 * index, 40), COLOURS[index % 4]).save(buffer, kind)
    return buffer.getvalue()


def b64(index: int) -> str:
    return base64.b64encode(picture(index)).decode()


def parquet(path: Path, rows: list[dict], images: tuple[str, ...] = ()) -> None:
    """Rows as a data set with Image columns stores them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    for column in images:
        table = table.cast_column(column, datasets.Image())
    table.to_parquet(str(path))


def vstar(folder: Path) -> None:
    text = "What is the colour of the glove?\n(A) red\n(B) blue\n(C) green\n(D) yellow"
    suffix = "\nAnswer with the option's letter from the given choices directly."
    rows = [
        {"image": {"bytes": picture(i), "path": None}, "text": text + suffix * (i == 1), "label": "ABC"[i],
         "question_id": str(i), "category": ("direct_attributes", "relative_position")[i % 2]}
        for i in range(3)
    ]  # fmt: skip
    parquet(folder / "data" / "test-00000-of-00001.parquet", rows, ("image",))


def zoombench(folder: Path) -> None:
    choice = "Which colour is the sign?\nA. red\nB. blue\nC. green\nD. yellow"
    asked = [
        (choice, "B"),
        ("How many birds are on the wire?", "7"),
        ("What does the sign say?", "Exit only"),
    ]
    rows = [
        {"id": i, "query": query, "response": response, "image": {"bytes": picture(i), "path": None},
         "crop_image": {"bytes": picture(i + 4), "path": None}}
        for i, (query, response) in enumerate(asked)
    ]  # fmt: skip
    parquet(folder / "data" / "test.parquet", rows, ("image", "crop_image"))


def hrbench(folder: Path, size: str) -> None:
    rows = []
    for question in range(2):
        for cycle in range(4):
            options = [COLOURS[(k + cycle) % 4] for k in range(4)]
            rows.append(
                {"index": len(rows), "question": "What is the colour of the car?", "answer": "ABCD"[-cycle % 4],
                 **dict(zip("ABCD", options, strict=True)), "category": ("single", "cross")[question],
                 "cycle_category": str(cycle), "image": b64(question)}
            )  # fmt: skip
    parquet(folder / f"hr_bench_{size}.parquet", rows)


def mme(folder: Path) -> None:
    options = [f"({letter}) {colour}" for letter, colour in zip("ABCD", COLOURS, strict=True)]
    rows = [
        {"index": i, "bytes": b64(i), "question": "What is the colour of the flag?", "answer": "ABE"[i],
         "multi-choice options": [*options, "(E) The image does not feature the flag"],
         "category": ("Perception/OCR with Complex Context", "Reasoning/Monitoring")[i % 2], "l2-category": f"t{i % 2}"}
        for i in range(3)
    ]  # fmt: skip
    parquet(folder / "data" / "train-00000-of-00001.parquet", rows)


def mmvp(folder: Path) -> None:
    (folder / "MMVP Images").mkdir(parents=True)
    with (folder / "Questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Index", "Question", "Options", "Correct Answer"])
        for index in range(1, 5):
            writer.writerow(
                [index, "Is the door open or closed?", "(a) Open (b) Closed", "(a)" if index % 2 else "(b)"]
            )
            (folder / "MMVP Images" / f"{index}.jpg").write_bytes(picture(index))


def cv_bench(folder: Path) -> None:
    kinds = [("2D", "Count", "ADE20K"), ("2D", "Relation", "COCO"), ("3D", "Depth", "Omni3D")]
    for kind in ("2D", "3D"):
        rows = [
            {"idx": i, "type": k, "task": task, "source": source, "image": {"bytes": picture(i, "PNG"), "path": None},
             "question": "How many cars?", "choices": ["1", "2"], "answer": "(B)",
             "prompt": "How many cars? Select from the following choices.\n(A) 1\n(B) 2"}
            for i, (k, task, source) in enumerate(kinds * 2) if k == kind
        ]  # fmt: skip
        parquet(folder / f"test_{kind.lower()}.parquet", rows, ("image",))


def mmstar(folder: Path) -> None:
    text = "Which colour is the sign?\nOptions: A: red, B: blue, C: green, D: yellow"
    rows = [
        {"index": i, "question": text, "image": picture(i), "answer": "ABCD"[i],
         "category": ("math", "perception")[i % 2], "l2_category": "x"}
        for i in range(4)
    ]  # fmt: skip
    parquet(folder / "mmstar.parquet", rows)


def pope(folder: Path) -> None:
    rows = [
        {"id": str(len(COLOURS) * k + i), "question_id": str(i), "question": f"Is there a {thing} in the image?",
         "answer": ("yes", "no")[i % 2], "image_source": f"COCO_val2014_{i // 2:012d}", "category": category,
         "image": {"bytes": picture(i // 2), "path": None}}
        for k, category in enumerate(("adversarial", "popular", "random"))
        for i, thing in enumerate(("dog", "cat", "car", "bus"))
    ]  # fmt: skip
    parquet(folder / "data" / "test-00000-of-00001.parquet", rows, ("image",))


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "vstar": vstar,
    "zoombench": zoombench,
    "hrbench_4k": lambda folder: hrbench(folder, "4k"),
    "hrbench_8k": lambda folder: hrbench(folder, "8k"),
    "mme_realworld_en": mme,
    "mme_realworld_cn": mme,
    "mme_realworld_lite": mme,
    "mmvp": mmvp,
    "cv_bench": cv_bench,
    "mmstar": mmstar,
    "pope": pope,
}


def miniature(folder: Path, split: str) -> None:
    schema.write(prepare.rows(split, 6, 0), folder / f"{split}.parquet")


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one folder a benchmark."""
    data = tmp_path_factory.mktemp("benchmarks")
    for name, build in LAYOUTS.items():
        build(data / name)
    return data


@pytest.fixture(scope="session")
def miniature_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("miniature")
    for split in ("test", "holdout"):
        miniature(folder, split)
    return folder


class Stub(ThreadingHTTPServer):
    """An OpenAI-compatible server that answers by a function of the request and remembers what it was asked."""

    # With a queue of 5 a busy client loses connections, and tries those again after a second.
    request_queue_size = 128

    def __init__(self, answer: Callable[[dict[str, Any]], dict[str, Any] | int], delay: float) -> None:
        self.answer, self.delay, self.asked = answer, delay, []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    """One chat completion a request; an int answer is an HTTP status."""

    server: Stub

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        time.sleep(self.server.delay)
        answer = self.server.answer(body)
        if isinstance(answer, int):
            self.send_error(answer)
            return
        completion = {
            "id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": answer.get("finish", "stop"),
                         "message": {"role": "assistant", "content": answer["text"], **answer.get("message", {})}}],
            "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14},
        }  # fmt: skip
        content = json.dumps(completion).encode()
        try:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):  # the asker was killed
            pass

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def text_of(body: dict[str, Any]) -> str:
    """The text of a request."""
    return "".join(c["text"] for c in body["messages"][0]["content"] if c["type"] == "text")


@pytest.fixture
def stub() -> Iterator[Callable[..., Stub]]:
    """Starts stub servers and ends them."""
    started: list[Stub] = []

    def start(answer: Callable[[dict[str, Any]], dict[str, Any] | int], delay: float = 0.0) -> Stub:
        server = Stub(answer, delay)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()
