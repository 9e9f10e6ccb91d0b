"""Runs every bad input and prints what the user sees, as a Markdown table.

    python -m benchmarks.bad_inputs [--processes]

In this process, where all of them take a minute; with `--processes` each as the command a user would type, with
its seconds, which takes half an hour for the imports alone.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

from benchmarks.bad_inputs import Case, cases

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = "--processes"


def told(case: Case, processes: bool) -> tuple[int, str, float]:
    """Exit code, standard error and seconds of the case's command; the case's own folder reads `...`."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        arguments = case.arguments(folder)
        start = time.perf_counter()
        code, said = (_in_a_process if processes else _here)(case, folder, arguments)
        seconds = time.perf_counter() - start
        return code, said.strip().replace(place, "...").replace(f"{ROOT}/", ""), seconds


def _in_a_process(case: Case, folder: Path, arguments: list[str]) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", case.module, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | case.variables(folder),
        timeout=300,
    )
    return done.returncode, done.stderr


def _here(case: Case, folder: Path, arguments: list[str]) -> tuple[int, str]:
    said = io.StringIO()
    with (
        mock.patch.dict(os.environ, case.variables(folder)),
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.chdir(folder),
    ):
        code = importlib.import_module(case.module).main(arguments)
    return code, said.getvalue()


def main() -> int:
    """Exit code 1 if a case ended otherwise than it should."""
    processes = PROCESSES in sys.argv[1:]
    wrong: list[str] = []
    codes: Counter[int] = Counter()
    print("| kind | command | exit | seconds | what is said |\n|---|---|---|---|---|")
    for case in cases():
        code, said, seconds = told(case, processes)
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
