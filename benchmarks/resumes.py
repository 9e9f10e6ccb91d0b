"""Interrupts a run as a user or a disk does, and resumes it: `python -m benchmarks.resumes [NAME...]`, a table.

Every case is Vision-OPD on a few rows of the miniature. `more updates`: a finished run of three is given six. `another
number of ranks`: one that has made three of six on one rank resumes with two. `Ctrl-C twice`: a second one while the
first is being obeyed. `full disk`: the run folder lies on a file system of its own (a mount of memory, so this case
needs root) that is filled before the second save, and emptied again. What was resumed must end with the answers of the
run that was left alone, to the bit; with two ranks, whose sums have another order, with finite and close numbers.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.kills import ROWS, lines, numbers
from data import schema, validate
from data.miniature import prepare
from vopd.backbone import checkpoints
from vopd.common import processes
from vopd.evaluation.records import read_records

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 1200.0
UPDATES = 6
CLOSE = 1e-3
SETTINGS = (
    "train.prompts=8", "train.rollouts=4", "train.warmup_steps=2", "train.save_every=1", "train.keep=2",
    "evaluate.test_rows=8", "evaluate.holdout_rows=4", "evaluate.validation_rows=4", "evaluate.every=0",
    "export=float32", "hardware.memory_gib=0.01", "hardware.disk_gib=0.001", "data.prepare=null",
)  # fmt: skip


class Case:
    """A run folder, its terminal, and what happened there."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.terminal = folder.with_suffix(".txt")

    def start(self, *arguments: str, steps: int = UPDATES) -> subprocess.Popen[bytes]:
        given = [
            f"run_dir={self.folder}",
            f"data.folder={self.data}",
            f"train.steps={steps}",
            *SETTINGS,
            *arguments,
        ]
        with self.terminal.open("ab") as terminal:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "vopd", "run", "vision_opd", *given],
                stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal, cwd=ROOT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip

    def end(self, run: subprocess.Popen[bytes], code: int = 0) -> None:
        assert run.wait(SECONDS) == code, self.said()
        assert not processes.Marked(self.folder).look(), "processes are left"

    def wait(self, run: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS
        while not ready():
            assert run.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.02)

    def updates(self) -> int:
        return lines(self.folder / "metrics.jsonl")

    def kept(self) -> list[int]:
        return [checkpoint.step for checkpoint in checkpoints.found(self.folder / "checkpoints")]

    def said(self, lines: int = 12) -> str:
        return "\n".join(self.terminal.read_text(errors="replace").splitlines()[-lines:])

    def sentence(self, part: str) -> str:
        found = [line for line in self.terminal.read_text().splitlines() if part in line]
        assert found, f"nothing said of '{part}': {self.said()}"
        return found[-1].strip()


def updates(file: Path) -> list[dict[str, Any]]:
    """The numbers of every update; an evaluation behind one is made where a run ends, and stands in its own records."""
    return [{k: v for k, v in line.items() if not k.startswith("evaluation/")} for line in numbers(file)]


def same(first: Path, second: Path) -> str:
    """Whether two finished runs are equal to the bit: numbers of every update, answers, model."""
    one, two = (updates(folder / "metrics.jsonl") for folder in (first, second))
    unequal = [
        f"update {a['step']}: {key}"
        for a, b in zip(one, two, strict=True)
        for key in a | b
        if a.get(key) != b.get(key)
    ]
    for name in ("before", "after"):
        file = f"records/{name}.jsonl"
        unequal += [file] * (read_records(first / file) != read_records(second / file))
    model = "model/model.safetensors"
    unequal += [model] * ((first / model).read_bytes() != (second / model).read_bytes())
    assert not unequal, unequal
    return "equal to the bit"


def more_updates(case: Case, whole: Path) -> list[str]:
    case.end(case.start(steps=3))
    assert case.updates() == 3
    case.end(case.start())
    assert (case.folder / "summary_step3.json").is_file(), "the first result is gone"
    return [case.sentence("resuming from"), same(whole, case.folder)]


def another_number_of_ranks(case: Case, whole: Path) -> list[str]:
    case.end(case.start(steps=3))
    case.end(case.start("hardware.devices_per_node=2"))
    differences = [
        abs(one["divergence"] - two["divergence"])
        for one, two in zip(
            numbers(whole / "metrics.jsonl"), numbers(case.folder / "metrics.jsonl"), strict=True
        )
    ]
    assert differences[:3] == [0.0] * 3 and max(differences) < CLOSE, differences
    return [
        case.sentence("resuming from"),
        f"divergence of updates 4 to 6 differs by {max(differences):.1g} at most",
    ]


def ctrl_c_twice(case: Case, whole: Path) -> list[str]:
    run = case.start()
    case.wait(run, lambda: case.updates() >= 2)
    run.send_signal(signal.SIGINT)
    time.sleep(0.2)
    began = time.monotonic()
    run.send_signal(signal.SIGINT)
    case.end(run, 130)
    seconds = time.monotonic() - began
    first = case.sentence("the same command resumes it from")
    case.end(case.start())
    return [f"ended {seconds:.1f} s after the second", first, same(whole, case.folder)]


def full_disk(case: Case, whole: Path) -> list[str]:
    with mounted(case.folder, 400):
        run = case.start()
        case.wait(run, lambda: bool(case.kept()))
        filler = case.folder.parent / case.folder.name / "log.fill"
        with filler.open("wb") as file:
            file.write(b"\0" * max(psutil.disk_usage(str(case.folder)).free - (8 << 20), 0))
        began = time.monotonic()
        code = run.wait(SECONDS)
        seconds = time.monotonic() - began
        assert code == 1, f"ended with {code}: {case.said()}"
        kept = case.kept()
        said = case.sentence("space")
        assert kept and all(
            checkpoints.problem(c) is None for c in checkpoints.found(case.folder / "checkpoints")
        )
        filler.unlink()
        case.end(case.start())
        return [
            f"exit code 1 after {seconds:.0f} s, checkpoints {kept} whole: {said}",
            same(whole, case.folder),
        ]


@contextmanager
def mounted(folder: Path, mebibytes: int) -> Iterator[None]:
    """A file system of this size at `folder`."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


CASES = {
    "more updates": more_updates,
    "another number of ranks": another_number_of_ranks,
    "Ctrl-C twice": ctrl_c_twice,
    "full disk": full_disk,
}


def main(arguments: list[str]) -> int:
    """Exit code 1 if a case came out otherwise than it should."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resumes", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"some of: {', '.join(CASES)}")
    given, bad = parser.parse_args(arguments), 0
    if unknown := set(given.names) - set(CASES):
        parser.error(f"unknown: {', '.join(unknown)}")
    with tempfile.TemporaryDirectory(prefix="vopd-resumes-") as name:
        place = Path(name)
        data = place / "data"
        for split, count in ROWS.items():
            schema.write(prepare.rows(split, count, 0), data / f"{split}.parquet")
        validate.stamped(data)
        whole = Case(place / "whole", data)
        whole.end(whole.start())
        print("| case | outcome |\n|---|---|", flush=True)
        for case in given.names or CASES:
            try:
                found = CASES[case](Case(place / case.replace(" ", "_"), data), whole.folder)
            except AssertionError as error:
                found, bad = [f"NOT AS IT SHOULD BE: {error}"], 1
            told = "; ".join(found).replace(name, "...").replace("|", "\\|").replace("\n", " / ")
            print(f"| {case} | {told} |", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
