"""Rows a second and peak memory of the data side, as a table: `python benchmarks/data_side.py [--rows 600 6000]`.

For each number of rows: a folder in the published layout is built from the miniature (not measured), then
`data.vision_opd_6k prepare` and `data.validate --model` run on it, each in a process of its own; and the miniature is
generated once in its usual size. Peak memory is that of the process (resident set, `ru_maxrss`); the row "import" says
what loading the libraries alone takes.
"""

import argparse
import importlib.util
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


def measured(*words: str) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, peak MiB) of a Python process that must end well."""
    start = time.perf_counter()
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-P", *words], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(words)} failed:\n{said.decode(errors='replace')[-2000:]}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def build(folder: Path, rows: int) -> Path:
    """A folder in the published layout, made by the builder of the tests."""
    path = ROOT / "tests" / "data" / "published_layout.py"
    spec = importlib.util.spec_from_file_location("published_layout", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    built: Path = module.build(folder, rows)
    return built


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[600, 6000])
    args = parser.parse_args()
    table = Table(box=box.MARKDOWN)
    for name in ("step", "rows", "wall s", "CPU s", "rows/s (wall)", "rows/s (CPU)", "peak MiB"):
        table.add_column(name, justify="left" if name == "step" else "right")

    def add(step: str, rows: int, figures: tuple[float, float, float]) -> None:
        wall, cpu, peak = figures
        rates = [f"{rows / seconds:,.0f}" if rows else "" for seconds in (wall, cpu)]
        table.add_row(step, f"{rows:,}" if rows else "", f"{wall:.1f}", f"{cpu:.1f}", *rates, f"{peak:,.0f}")

    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        add("import", 0, measured("-c", "import data.validate, transformers; transformers.AutoProcessor"))
        for rows in args.rows:
            published, out = build(place / f"published{rows}", rows), place / f"out{rows}"
            words = [
                "--source",
                str(published),
                "--out",
                str(out),
                "--validation-rows",
                "64",
                "--test-rows",
                "64",
            ]
            add("prepare", rows, measured("-m", "data.vision_opd_6k", "prepare", *words))
            add("validate", rows, measured("-m", "data.validate", str(out), "--model", str(BASE)))
        generated = measured("-m", "data.miniature.prepare", "--out", str(place / "miniature"))
        add("miniature, validated", 6241 + 256 + 1024 + 512, generated)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
