"""Rows a second and peak memory of the data side, as a table: `python benchmarks/data_side.py [--rows 600 6000]`.

For each number of rows, a folder in the published layout is built (not shown), with pictures of the published sizes
times `--scale`: at 1, about 18 MB a picture of disk, packed and extracted. `--pictures` bounds how many different ones
there are: further rows ask again about the first ones. Then `data.vision_opd_6k prepare`, `data.validate` and
`data.validate --model` run on it, each in a process of its own; and the miniature is generated once in its usual size.
CPU seconds and memory are those of the process and all that it starts, looked at five times a second; memory is the sum
of their proportional set sizes (PSS: what processes share counts once). Rows without a count show what the libraries
alone take.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "data" / "miniature" / "base"
BUILDER = ROOT / "tests" / "data" / "published_layout.py"


def measured(*arguments: str) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, peak MiB) of a Python process that must end well, and of all that it starts."""
    start, peak = time.perf_counter(), 0.0
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    cpu: dict[psutil.Process, float] = {}
    with tempfile.TemporaryFile() as said:
        process = psutil.Popen(
            [sys.executable, "-P", *arguments], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=said
        )
        while process.poll() is None:
            peak = max(peak, sum(_looked_at(process, cpu)) / 2**20)
            time.sleep(0.2)
        seconds = time.perf_counter() - start
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(arguments)} failed:\n{said.read().decode(errors='replace')[-2000:]}")
    return seconds, sum(cpu.values()), peak


def _looked_at(process: psutil.Process, cpu: dict[psutil.Process, float]) -> Iterator[int]:
    """Bytes of memory of each process of a tree; `cpu` gets its CPU seconds so far."""
    with suppress(psutil.NoSuchProcess):
        for each in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                times = each.cpu_times()
                cpu[each] = times.user + times.system
                yield each.memory_full_info().pss


def ask_again(published: Path, rows: int) -> None:
    """Further rows of train.jsonl, which ask about the pictures of the first ones."""
    file = published / "train.jsonl"
    lines = file.read_text().splitlines()
    with file.open("a") as more:
        for number in range(len(lines), rows):
            row = json.loads(lines[number % len(lines)])
            row["problem"] = row["problem"].replace("<image>\n", f"<image>\nQuestion {number}. ")
            more.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[600, 6000])
    parser.add_argument("--pictures", type=int, default=600, help="most different pictures (default: 600)")
    parser.add_argument("--prepare-only", action="store_true", help="nothing but `prepare`")
    parser.add_argument("--scale", type=float, default=1, help="of the published sizes (default: 1)")
    args = parser.parse_args()
    table = Table(box=box.MARKDOWN)
    for name in ("step", "rows", "wall s", "CPU s", "rows/s (wall)", "rows/s (CPU)", "peak MiB"):
        table.add_column(name, justify="left" if name == "step" else "right")

    def add(step: str, rows: int, figures: tuple[float, float, float]) -> None:
        wall, cpu, peak = figures
        rates = [f"{rows / seconds:,.1f}" if rows else "" for seconds in (wall, cpu)]
        table.add_row(step, f"{rows:,}" if rows else "", f"{wall:.1f}", f"{cpu:.1f}", *rates, f"{peak:,.0f}")

    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        add("libraries of prepare, validate", 0, measured("-c", "import data.vision_opd_6k.prepare"))
        load = f"import data.validate; data.validate.prompts_for({str(BASE)!r}, 8192)"
        add("libraries of validate --model", 0, measured("-c", load))
        for rows in args.rows:
            published, out = place / f"published{rows}", place / f"out{rows}"
            measured(str(BUILDER), str(published), str(min(rows, args.pictures)), str(args.scale))
            ask_again(published, rows)
            arguments = [
                "--source",
                str(published),
                "--out",
                str(out),
                "--validation-rows",
                "64",
                "--test-rows",
                "64",
            ]
            add(
                "prepare",
                rows,
                measured("-m", "vopd", "data", "prepare", "vision_opd_6k", *arguments),
            )
            if args.prepare_only:
                continue
            add("validate", rows, measured("-m", "vopd", "data", "validate", str(out)))
            add(
                "validate --model",
                rows,
                measured("-m", "vopd", "data", "validate", str(out), "--model", str(BASE)),
            )
        if not args.prepare_only:
            generated = measured(
                "-m", "vopd", "data", "prepare", "miniature", "--out", str(place / "miniature")
            )
            add("miniature, validated", 6241 + 256 + 1024 + 512, generated)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
