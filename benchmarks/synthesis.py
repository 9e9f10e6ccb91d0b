"""Synthesis requests per second against the stand-in server: `python benchmarks/synthesis.py --images FOLDER`.

The server is a process of its own that takes a set time a reply, as a model would; what is measured is how well the
pipeline keeps it busy. Each line is a synthesis from nothing; regions and crops are made before the clock starts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data.synthesis import config
from data.synthesis.pipeline import Pipeline

STUB = Path(__file__).parents[1] / "tests" / "data" / "synthesis" / "stub_server.py"


def measure(url: str, images: Path, out: Path, concurrency: int) -> tuple[int, int, float]:
    """Requests, rows and seconds of one synthesis."""
    overrides = [
        f"images={images}",
        f"out={out}",
        "source=benchmark",
        "licence=none",
        f"server.base_url={url}",
        "server.model=stub",
        f"server.concurrency={concurrency}",
        "filter.min_width=300",
        "filter.min_height=300",
        "propose.per_image=3",
    ]
    with Pipeline(config.load(overrides)) as pipeline, contextlib.redirect_stderr(io.StringIO()):
        pipeline.crops()
    with Pipeline(config.load(overrides)) as pipeline, contextlib.redirect_stderr(io.StringIO()):
        began = time.perf_counter()
        rows = pipeline.run()
        seconds = time.perf_counter() - began
        asked = sum(
            "tokens" in record for stage in pipeline.stages for record in stage.journal.records.values()
        )
    return asked, rows, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--delay", type=float, default=0.1, help="seconds a reply takes")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    args = parser.parse_args()
    stub = subprocess.Popen(
        [sys.executable, "-P", STUB, "--port", "0", "--delay", str(args.delay)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert stub.stdout is not None
        match = re.search(r"http\S+/v1", stub.stdout.readline())
        assert match, "the stand-in server did not start"
        print("| concurrent | requests | rows | seconds | requests/s | at most, by the delay |")
        print("|---|---|---|---|---|---|")
        with tempfile.TemporaryDirectory() as folder:
            for concurrency in args.concurrency:
                asked, rows, seconds = measure(
                    match[0], args.images, Path(folder) / str(concurrency), concurrency
                )
                bound = f"{concurrency / args.delay:.0f}" if args.delay else "-"
                print(
                    f"| {concurrency} | {asked} | {rows} | {seconds:.1f} | {asked / seconds:.1f} | {bound} |"
                )
    finally:
        stub.terminate()
        stub.wait()


if __name__ == "__main__":
    main()
