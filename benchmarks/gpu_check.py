"""Whether the kernels and the whole stack work on this machine's GPU: one table, and a JSON file.

    bash scripts/gpu_check.sh [--device cuda] [--out runs/gpu_check.json] [--parts NAME ...]

Parts run one after another, each in a process of its own with its own time limit (480 s in all on a GPU), so that one
that crashes or hangs does not stop the next. A part's rows are printed as soon as it ends, and the file is written anew
after each. Those that need torch alone come first. `--device cpu` runs all of them at miniature size. Exits with 1 if a
row is above its limit or a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks import gpu_parts
from benchmarks.gpu_parts import Row
from vopd.common import files, provenance
from vopd.common.paths import ROOT

Part = Callable[[str], Iterator[Row]]
PARTS: dict[str, tuple[Part, int]] = {
    "delta_rule": (gpu_parts.delta_rule, 40),
    "products": (gpu_parts.products, 20),
    "kernels": (gpu_parts.kernels, 50),
    "head_values": (gpu_parts.head_values, 20),
    "head_time": (gpu_parts.head_time, 20),
    "vision_opd": (gpu_parts.vision_opd, 165),
    "grpo": (gpu_parts.grpo, 165),
}
"""Name -> what measures it, and the seconds that it may take on a GPU."""
CPU_TIMES = 6  # a CPU compiles and renders on the cores that also train
GRACE = 20  # seconds between asking a part to stop and killing it


def run_part(name: str, device: str, limit: float, log: IO[bytes]) -> dict[str, Any]:
    """One part in a process of its own: its rows (those it had found, if it did not end) and how it ended."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        found = Path(folder) / "rows.jsonl"
        found.touch()
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", device, "--part", name]
        process = subprocess.Popen(
            [*command, "--rows-to", str(found)], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        rows = [Row(*json.loads(line)) for line in found.read_text(encoding="utf-8").splitlines()]
    return {
        "part": name,
        "state": _state(code, rows, limit),
        "seconds": round(time.perf_counter() - start, 1),
        "rows": [row._asdict() for row in rows],
    }


def _state(code: int | None, rows: Sequence[Row], limit: float) -> str:
    if code is None:
        return f"took longer than {limit:g} s"
    if code:
        return f"failed with exit code {code}"
    return "ok" if all(row.holds() for row in rows) else "above a limit"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a part and all that it started; `vopd run` ends its own tree when it is asked to."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def check(device: str, names: Sequence[str], out: Path) -> list[dict[str, Any]]:
    """Run these parts, print each one's rows when it ends, and keep `out` up to date."""
    ended: list[dict[str, Any]] = []
    print("| part | what | value | limit |\n|---|---|---|---|", flush=True)
    about, log_path = facts(device), out.with_suffix(".log")
    out.parent.mkdir(parents=True, exist_ok=True)
    log_path.unlink(missing_ok=True)
    for name in names:
        limit = PARTS[name][1] * (CPU_TIMES if device == "cpu" else 1)
        with log_path.open("ab") as log:
            begin = log.tell()
            part = run_part(name, device, limit, log)
        if part["state"] not in ("ok", "above a limit"):
            part["error"] = log_path.read_bytes()[begin:].decode(errors="replace")[-4000:]
        ended.append(part)
        files.write_text(out, json.dumps({**about, "parts": ended}, indent=1) + "\n")
        for row in (Row(**row) for row in part["rows"]):
            print(line(name, row), flush=True)
        print(f"| {name} | {part['state']} | {part['seconds']:g} s | {limit:g} s |", flush=True)
        if "error" in part:
            print(f"{name}: the last lines of {log_path}:\n{part['error'][-800:]}", flush=True)
    return ended


def line(part: str, row: Row) -> str:
    """A row of the table."""
    value = row.unit if row.value is None else f"{row.value:.3g} {row.unit}".strip()
    limit = "-" if row.limit is None else f"{row.limit:.0e}" if row.limit else "0"
    return f"| {part} | {row.name} | {value} | {limit} |{'' if row.holds() else ' ABOVE'}"


def facts(device: str) -> dict[str, Any]:
    """What was checked, and on what."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": provenance.code_version(ROOT),
        "machine": provenance.machine(device),
        "libraries": provenance.library_versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check.json"))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--rows-to", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        with args.rows_to.open("w", encoding="utf-8") as file:
            for row in PARTS[args.part][0](args.device):
                print(json.dumps(row), file=file, flush=True)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_check: torch sees no GPU; --device cpu runs every part at miniature size.", file=sys.stderr
        )
        sys.exit(2)
    started = time.perf_counter()
    ended = check(args.device, args.parts, args.out)
    failed = [part["part"] for part in ended if part["state"] != "ok"]
    print(
        f"\n{len(ended)} parts in {time.perf_counter() - started:.0f} s, not ok: {', '.join(failed) or 'none'}"
    )
    print(f"written to {args.out}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
