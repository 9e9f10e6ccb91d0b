"""Rows a second and peak memory of the data side, as a table: `python benchmarks/data_side.py [--rows 600 6000]`.

For each number of rows, a folder in the published layout is built (not shown), with pictures of the published sizes
times `--scale`: at 1, about 25 MB a row of disk, packed and extracted. Then `data.vision_opd_6k prepare`,
`data.validate` and `data.validate --model` run on it, each in a process of its own; and the miniature is generated once
in its usual size. Peak memory is the process's resident set (`ru_maxrss`; a child
starts with its parent's peak, so this process stays small). Rows without a count show what the libraries alone take.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "data" / "miniature" / "base"
BUILDER = ROOT / "tests" / "data" / "published_layout.py"


def measured(*arguments: str) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, peak MiB) of a Python process that must end well."""
    start = time.perf_counter()
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-P", *arguments],
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{said.decode(errors='replace')[-2000:]}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[600, 6000])
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
            measured(str(BUILDER), str(published), str(rows), str(args.scale))
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
            add("validate", rows, measured("-m", "vopd", "data", "validate", str(out)))
            add(
                "validate --model",
                rows,
                measured("-m", "vopd", "data", "validate", str(out), "--model", str(BASE)),
            )
        generated = measured("-m", "vopd", "data", "prepare", "miniature", "--out", str(place / "miniature"))
        add("miniature, validated", 6241 + 256 + 1024 + 512, generated)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
