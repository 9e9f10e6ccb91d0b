"""Runs every bad input as a process of its own and prints what a person sees: a Markdown table."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.bad_inputs import Case, cases

ROOT = Path(__file__).resolve().parents[2]


def told(case: Case) -> tuple[int, str, float]:
    """Exit code, standard error and seconds of the case's command; the case's own folder reads `...`."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        words = case.words(folder)
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-P", "-m", case.module, *words],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | case.variables(folder),
            timeout=300,
        )
        seconds = time.perf_counter() - start
        return done.returncode, done.stderr.strip().replace(place, "...").replace(f"{ROOT}/", ""), seconds


def main() -> int:
    """Exit code 1 if a case ended otherwise than it should."""
    wrong: list[str] = []
    codes: Counter[int] = Counter()
    print("| kind | command | exit | seconds | what is said |\n|---|---|---|---|---|")
    for case in cases():
        code, said, seconds = told(case)
        codes[code] += 1
        if code != case.code or case.says not in said or "Traceback" in said:
            wrong.append(case.kind)
        line = said.replace("\n", " / ").replace("|", "\\|")
        print(f"| {case.kind} | `{case.module}` | {code} | {seconds:.1f} | {line} |", flush=True)
    print(
        f"\n{sum(codes.values())} kinds; by exit code: {dict(codes)}; otherwise than expected: {wrong or 'none'}"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
