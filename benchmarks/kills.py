"""Kills every recipe at random points and shows that it ends as if nothing had happened: a Markdown table.

    python -m benchmarks.kills [RECIPE...] [--out FOLDER] [--seed N] [--parallel N]

Of each recipe two runs of five updates are made with a checkpoint after every update: one is left alone, the other is
killed four times, each time in another way, and started again with the same command. Then everything is compared to the
bit: of every update the weights, the optimiser, the teachers and the place in the data (by the checksums of the
checkpoints), the lines of metrics.jsonl and evaluations.jsonl, all answers, and the exported model. Of the lines three
kinds of number are left out: seconds, memory, and `rollout/...`: how vLLM's log-probs of the sampled tokens differ from
the trainer's in the last digit depends on which requests it happened to compute together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from data import schema, validate
from data.miniature import prepare
from vopd.common import processes
from vopd.evaluation.records import read_records

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("vision_opd", "sft_self_teacher", "grpo", "dapo", "opsd", "opsd_original")
UPDATES = 5
ROWS = {"train": 48, "validation": 8, "test": 24, "holdout": 12}
SECONDS = 1200.0
SETTINGS = (
    f"train.steps={UPDATES}", "train.prompts=8", "train.rollouts=4", "train.warmup_steps=2", "train.save_every=1",
    "train.keep=99", "evaluate.test_rows=8", "evaluate.holdout_rows=4", "evaluate.validation_rows=4",
    "evaluate.every=2", "export=float32", "hardware.memory_gib=0.01", "hardware.disk_gib=0.01", "data.prepare=null",
)  # fmt: skip
KILLS = ("launcher", "trainer worker", "vLLM engine", "in a save")
TITLES = {"trainer worker": "ray::WorkerDict", "vLLM engine": "VLLM::EngineCore"}


@dataclass
class Kill:
    """What was done to a run, and how it took it."""

    what: str
    update: int
    code: int | None
    seconds: float
    left: int


class Play:
    """A recipe's two runs."""

    def __init__(self, recipe: str, data: Path, place: Path, seed: int) -> None:
        self.recipe, self.data, self.place = recipe, data, place / recipe
        self.rng = random.Random(f"{seed} {recipe}")
        self.kills: list[Kill] = []

    def rows(self) -> list[str]:
        """Both runs, and a row of the table for every kill."""
        self.place.mkdir(parents=True)
        whole = self.start("whole")
        assert whole.wait(SECONDS) == 0, self.told("whole")
        order = self.rng.sample(KILLS, len(KILLS))
        for update, what in enumerate(order, 1):
            self.kill(self.start("killed"), what, update)
        last = self.start("killed")
        code = last.wait(SECONDS)
        differs = (
            self.differences() if code == 0 else [f"the last start ended with {code}: {self.told('killed')}"]
        )
        outcome = "equal to the bit" if not differs else "; ".join(differs)
        return [
            f"| {self.recipe} | {k.what} | {k.update} | {k.code} | {k.seconds:.1f} | {k.left} | {outcome} |"
            for k in self.kills
        ]

    def start(self, name: str) -> subprocess.Popen[bytes]:
        overrides = [f"run_dir={self.place / name}", f"data.folder={self.data}", *SETTINGS]
        with (self.place / f"{name}.txt").open("ab") as terminal:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "vopd", "run", self.recipe, *overrides],
                stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal, cwd=ROOT,
            )  # fmt: skip

    def told(self, name: str) -> str:
        return (self.place / f"{name}.txt").read_text(errors="replace")[-300:].replace("\n", " / ")

    # ---- killing --------------------------------------------------------------------------------------------------

    def kill(self, run: subprocess.Popen[bytes], what: str, update: int) -> None:
        folder = self.place / "killed"
        if what == "in a save":  # a save takes a tenth of a second: the process to kill is looked for before
            self.wait(run, lambda: self.victim(run, what) is not None, 0.2)
            victim = self.victim(run, what)
            self.wait(run, lambda: any((folder / "checkpoints").glob("writing_*")), 0.001)
        else:
            self.wait(run, lambda: lines(folder / "metrics.jsonl") >= update, 0.05)
            time.sleep(self.rng.uniform(0.0, 1.5))
            victim = self.victim(run, what)
        assert victim is not None, f"no process of the {what}"
        began = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        code = run.wait(SECONDS)
        of_run, end = processes.Marked(folder), began + 60
        while (left := of_run.look()) and time.monotonic() < end:
            time.sleep(0.2)
        self.kills.append(Kill(what, update, code, time.monotonic() - began, len(left)))
        processes.end(left)

    def wait(self, run: subprocess.Popen[bytes], ready: Callable[[], bool], pause: float) -> None:
        end = time.monotonic() + SECONDS
        while not ready():
            assert run.poll() is None and time.monotonic() < end, self.told("killed")
            time.sleep(pause)

    @staticmethod
    def victim(run: subprocess.Popen[bytes], what: str) -> int | None:
        """The process to kill; for a kill in a save, the one that seals the checkpoint."""
        if what == "launcher":
            return run.pid
        for process in psutil.Process(run.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if TITLES.get(what, "vopd.backbone.launch") in " ".join(process.cmdline()):
                    return process.pid
        return None

    # ---- comparing ------------------------------------------------------------------------------------------------

    def differences(self) -> list[str]:
        """What is not equal between the two runs."""
        first, second = self.place / "whole", self.place / "killed"
        found = []
        for update in range(1, UPDATES + 1):
            sums = [checksums(folder / "checkpoints" / f"global_step_{update}") for folder in (first, second)]
            found += [f"update {update}: {name}" for name in sums[0] if sums[0][name] != sums[1].get(name)]
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            if numbers(first / name) != numbers(second / name):
                found.append(name)
        for file in (first / "records").glob("*.jsonl"):
            if read_records(file) != read_records(second / "records" / file.name):
                found.append(f"records/{file.name}")
        model = "model/model.safetensors"
        if (first / model).read_bytes() != (second / model).read_bytes():
            found.append(model)
        return found


def checksums(folder: Path) -> dict[str, str]:
    """Checksums of a checkpoint's files; its trainer.json has seconds in it and is compared by metrics.jsonl."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {
        name: digest for name, (_, digest) in files.items() if name not in ("trainer.json", "config.yaml")
    }


def lines(file: Path) -> int:
    """Whole lines of a file that may not be there yet."""
    return file.read_text().count("\n") if file.exists() else 0


CLOCK = ("seconds", "perf/", "rollout/")


def numbers(file: Path) -> list[dict[str, Any]]:
    """A file's lines without what depends on the clock."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(CLOCK)} for line in found]


def main(arguments: list[str]) -> int:
    """Exit code 1 if a killed run ended otherwise than the other one, or left a process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=1)
    given = parser.parse_args(arguments)
    place = given.out or Path(tempfile.mkdtemp(prefix="kills-"))
    data = place / "data"
    for split, count in ROWS.items():
        schema.write(prepare.rows(split, count, 0), data / f"{split}.parquet")
    validate.stamped(data)
    plays = [Play(recipe, data, place, given.seed) for recipe in given.recipes]
    print(
        "| recipe | killed | in or after update | exit code | seconds to the end | processes left | outcome |"
    )
    print("|---|---|---|---|---|---|---|")
    with ThreadPoolExecutor(given.parallel) as pool:
        for rows in pool.map(Play.rows, plays):
            print("\n".join(rows), flush=True)
    bad = [p.recipe for p in plays if p.differences() or any(k.left for k in p.kills)]
    print(
        f"\n{sum(len(p.kills) for p in plays)} kills of {len(plays)} recipes; unequal or left behind: {bad or 'none'}"
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
