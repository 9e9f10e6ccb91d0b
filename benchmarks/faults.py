"""Seconds from a fault to the sentence on the terminal: `python -m benchmarks.faults [--only NAME ...] [--out FILE]`.

Each fault is a run of its own, on the miniature with a few rows: a recipe outside the repository that makes a mistake,
an image that is spoilt after the checks, a setting that vLLM cannot start with, a signal to one of the processes after
the first update. What is measured begins when the fault happens (a recipe writes the time down) and ends when the
sentence is read from the command's output. What is left of the run after its end is counted. One run takes a minute
on two free cores; stopped processes share one.
"""

from __future__ import annotations

import argparse
import io
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from PIL import Image

from data import schema, validate
from data.miniature import prepare
from vopd.common import processes
from vopd.runner.new_recipe import new

ROOT = Path(__file__).resolve().parents[1]
ROWS = {"train": 32, "validation": 4, "test": 8, "holdout": 4}
OVERRIDES = (
    "data.prepare=null train.save_every=1000 train.prompts=4 train.rollouts=2 evaluate.every=0 export=float32 "
    "evaluate.test_rows=8 evaluate.holdout_rows=4 hardware.memory_gib=0.01 hardware.disk_gib=0.01"
).split()
START_SECONDS, TOLD_SECONDS, END_SECONDS = 900.0, 300.0, 120.0
INTERRUPTED = 130
ROLES = {
    "trainer worker": "WorkerDict",
    "rollout worker": "ViewRolloutWorker",
    "vLLM server": "vLLMHttpServer",
    "vLLM engine": "EngineCore",
    "TransferQueue controller": "TransferQueueController",
    "TransferQueue storage": "SimpleStorageUnit",
    "Ray node process": "raylet",
    "Ray control process": "gcs_server",
}
CALLS = {
    "score": ("self, chunk", "ForwardKL.score"),
    "loss": ("self, per_token, mask_BT, batch", "ForwardKL.loss"),
    "prepare": ("self, rollouts", "ForwardKL.prepare"),
    "rewards": ("self, rollouts", "ForwardKL.rewards"),
}


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        name: for the table.
        says: part of the sentence.
        code: the exit code.
        recipe: (function, its body): what the recipe does instead.
        overrides: settings.
        act: what is done to the run from outside once it is ready.
        ready: file of the run folder whose presence shows it.
    """

    name: str
    says: str
    code: int = 1
    recipe: tuple[str, str] | None = None
    overrides: tuple[str, ...] = ()
    act: Callable[[Run], None] | None = None
    ready: str = "metrics.jsonl"


@dataclass
class Run:
    """A running command and what it has printed, with the time of each line."""

    folder: Path
    data: Path
    process: subprocess.Popen[str]
    lines: list[tuple[float, str]] = field(default_factory=list)
    incoming: queue.Queue[tuple[float, str]] = field(default_factory=queue.Queue)
    at: float = 0.0

    def read(self) -> None:
        """Take what has come meanwhile."""
        while not self.incoming.empty():
            self.lines.append(self.incoming.get())

    def wait(self, ready: Callable[[], object], seconds: float) -> bool:
        """Whether it became true in time; the command's end ends the waiting."""
        end = time.time() + seconds
        while time.time() < end:
            self.read()
            if ready():
                return True
            if self.process.poll() is not None:
                time.sleep(0.5)
                self.read()
                return bool(ready())
            time.sleep(0.1)
        return False

    def said(self, text: str) -> tuple[float, str] | None:
        """The first line with this text after the fault."""
        return next(((when, line) for when, line in self.lines if text in line and when >= self.at), None)

    def of(self, name: str) -> psutil.Process:
        """The process of this name."""
        wanted = processes.ROLES[name]
        found = [p for p in processes.Marked(self.folder).look() if processes.role(p) == wanted]
        return found[0]

    def driver(self) -> psutil.Process:
        """The training process."""
        return next(
            p for p in psutil.Process(self.process.pid).children() if "vopd.backbone.launch" in p.cmdline()
        )


def kill(name: str) -> Callable[[Run], None]:
    """Kill the process of this name."""

    def act(run: Run) -> None:
        victim = run.of(name)
        run.at = time.time()
        victim.kill()

    return act


def kill_driver(run: Run) -> None:
    """Kill the training process."""
    victim = run.driver()
    run.at = time.time()
    victim.kill()


def kill_terminal(run: Run) -> None:
    """Kill the command itself: nobody is left to say anything."""
    run.at = time.time()
    run.process.kill()


def spoil_images(content: bytes | None) -> Callable[[Run], None]:
    """Replace every training image that lies beside the data, or remove it."""

    def act(run: Run) -> None:
        for file in (run.data / "images").iterdir():
            file.write_bytes(content) if content else file.unlink()
        run.at = time.time()

    return act


NAN = "return {'divergence': chunk.student_logits_CV.sum(-1) * float('nan')}"
USER_ERROR = "from vopd.errors import UserError; raise UserError('k is too large: choose another k')"
DEADLOCK = (
    "import threading, torch; torch.Tensor.backward = lambda *given, **more: threading.Event().wait(); "
    "return {'divergence': chunk.student_logits_CV.sum(-1)}"
)
INFINITE = "return rollouts.correct_B / 0.0 - float('inf')"
WRONG_SHAPE = "return {'divergence': chunk.student_logits_CV.sum()}"
VLLM = "verl.actor_rollout_ref.rollout.engine_kwargs.vllm"
LORA = "verl.actor_rollout_ref.model.lora_rank=8"
CHECKED = "verl_config.yaml"  # written when all checks are done
FAULTS = [
    Fault(
        "error in score (trainer worker)",
        "ZeroDivisionError: division by zero [",
        1,
        ("score", "return 1 / 0"),
    ),
    Fault("error in loss (trainer worker)", "KeyError: 'no' [", 1, ("loss", "return per_token['no']")),
    Fault(
        "error in prepare (driver)",
        "AttributeError: ",
        1,
        ("prepare", "return {'weights': rollouts.weights}"),
    ),
    Fault(
        "wrong shape from score (trainer worker)",
        "'divergence' as a tensor of shape ()",
        2,
        ("score", WRONG_SHAPE),
    ),
    Fault("wrong values from rewards (driver)", "a value that is not finite", 2, ("rewards", INFINITE)),
    Fault("UserError in score (trainer worker)", "choose another k", 2, ("score", USER_ERROR)),
    Fault("every gradient NaN", "no update of 2 was applied", 1, ("score", NAN), ("train.steps=2",)),
    Fault(
        "image removed while Ray starts (data set, driver)",
        "No such file",
        2,
        act=spoil_images(None),
        ready=CHECKED,
    ),
    Fault(
        "image spoilt while Ray starts (rollout worker)",
        "not a readable image",
        2,
        act=spoil_images(b"no"),
        ready=CHECKED,
    ),
    Fault(
        "endless loop in score (trainer worker)",
        "has been in score",
        INTERRUPTED,
        ("score", "while True: pass"),
    ),
    Fault(
        "deadlock: all processes wait (trainer worker)",
        "has computed nothing for",
        INTERRUPTED,
        ("score", DEADLOCK),
    ),
    Fault("vLLM: LoRA, which its CPU rollout cannot take", "LoRA weights cannot be sent", overrides=(LORA,)),
    Fault(
        "vLLM: an option's value that it does not know",
        "invalid choice",
        overrides=(f"{VLLM}.mamba_ssm_cache_dtype=no",),
    ),
    Fault("vLLM: a cache that is too small", "KV cache memory", overrides=("rollout.cache_gib=0.0001",)),
    *(
        Fault(f"kill -9 of the {name}", processes.ROLES[title].split(" (")[0], act=kill(title))
        for name, title in ROLES.items()
    ),
    Fault("kill -9 of the driver", "was killed by SIGKILL", act=kill_driver),
    Fault("kill -9 of the command", "", -9, act=kill_terminal),
]


def make_data(folder: Path) -> None:
    """Small splits; the images of the training rows are files beside the table."""
    (folder / "images").mkdir(parents=True)
    for split, count in ROWS.items():
        rows = prepare.rows(split, count, 0)
        if split == "train":
            rows = [_with_files(row, folder) for row in rows]
        schema.write(rows, folder / f"{split}.parquet")
    assert not validate.stamped(folder).blocking


def _with_files(row: dict[str, object], folder: Path) -> dict[str, object]:
    changed = dict(row)
    for column in ("image", "crop"):
        cell = row[column]
        picture = cell if isinstance(cell, Image.Image) else Image.open(io.BytesIO(cell["bytes"]))  # type: ignore[index]
        name = f"images/{row['id']}-{column}.png"
        picture.save(folder / name)
        changed[column] = {"bytes": None, "path": name}
    return changed


def make_recipe(fault: Fault, folder: Path) -> str:
    """The recipe's file; a plain one unless the fault is in it."""
    yaml, module, _ = new("forward_kl", folder)
    text = (
        module.read_text()
        .replace("class ForwardKl", "class ForwardKL")
        .replace("return ForwardKl", "return ForwardKL")
    )
    if fault.recipe:
        name, body = fault.recipe
        arguments, target = CALLS[name]
        text += (
            f"\n\nimport time\nfrom pathlib import Path\n\n\ndef {name}({arguments}):\n"
            f"    Path({str(folder / 'fault')!r}).write_text(str(time.time()))\n    {body}\n\n\n{target} = {name}\n"
        )
    module.write_text(text)
    return str(yaml)


@contextmanager
def started(fault: Fault, place: Path) -> Iterator[Run]:
    """The command of a run with this fault."""
    recipe, data = make_recipe(fault, place / "recipe"), place / "data"
    make_data(data)
    overrides = [
        *OVERRIDES,
        f"run_dir={place / 'run'}",
        f"data.folder={data}",
        "train.steps=1000",
        *fault.overrides,
    ]
    overrides = list({override.split("=")[0]: override for override in overrides}.values())
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "vopd", "run", recipe, *overrides],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "2000"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    run = Run(place / "run", data, process)
    assert process.stdout is not None
    output = process.stdout

    def follow() -> None:
        for line in output:
            run.incoming.put((time.time(), line.strip()))

    threading.Thread(target=follow, daemon=True).start()
    try:
        yield run
    finally:
        processes.end(processes.Marked(run.folder).look())
        if process.poll() is None:
            process.kill()
        process.wait()


def measure(fault: Fault) -> tuple[str, bool]:
    """The row of the table, and whether all was as it should be."""
    with tempfile.TemporaryDirectory(prefix="vopd-fault-") as name:
        place = Path(name)
        with started(fault, place) as run:
            seconds, line = _told(fault, run)
            for _ in range(
                2 if fault.code == INTERRUPTED else 0
            ):  # the first asks for a checkpoint, which never comes
                if not run.wait(lambda: run.process.poll() is not None, 3.0):
                    run.process.send_signal(signal.SIGINT)
            run.wait(lambda: run.process.poll() is not None, END_SECONDS)
            code = run.process.poll()
            time.sleep(0.0 if fault.says else 5.0)
            orphans = len(processes.Marked(run.folder).look())
            output = "\n".join(text for _, text in run.lines)
        right = code == fault.code and (bool(line) or not fault.says) and not orphans
        if not right:
            print(f"--- {fault.name}\n{output[-3000:]}", file=sys.stderr, flush=True)
        said = line.replace(name, "...").replace(f"{ROOT}/", "").replace("|", "\\|")
        return f"| {fault.name} | {seconds} | {code} | {orphans} | {said} |", right


def _told(fault: Fault, run: Run) -> tuple[str, str]:
    """Seconds from fault to sentence, and the sentence."""
    at = run.folder.parent / "recipe" / "fault"
    if fault.act:
        if not run.wait((run.folder / fault.ready).exists, START_SECONDS):
            return "-", ""
        fault.act(run)
    elif fault.recipe:
        run.wait(at.exists, START_SECONDS)
    else:  # vLLM does not start: the fault is what its process writes into the log
        run.wait(lambda: fault.says in _log(run.folder), START_SECONDS)
        run.at = time.time()
    if not fault.says:
        end = time.time() + END_SECONDS
        while processes.Marked(run.folder).look() and time.time() < end:
            time.sleep(0.1)
        return f"{time.time() - run.at:.0f} (all processes gone)", ""
    if not run.wait(lambda: run.said(fault.says), TOLD_SECONDS):
        return "-", ""
    when, line = run.said(fault.says) or (0.0, "")
    return f"{when - (float(at.read_text()) if at.exists() else run.at):.0f}", line


def _log(folder: Path) -> str:
    return (folder / "log.txt").read_text(errors="replace") if (folder / "log.txt").exists() else ""


def stops(names: dict[str, str]) -> Iterator[tuple[str, bool]]:
    """One run in which each of these processes is stopped, told of, and continued."""
    with (
        tempfile.TemporaryDirectory(prefix="vopd-fault-") as place,
        started(Fault("", ""), Path(place)) as run,
    ):
        run.wait((run.folder / "metrics.jsonl").exists, START_SECONDS)
        for name, role in {**names, "driver": ""}.items():
            process = run.of(role) if role else run.driver()
            run.at = time.time()
            process.suspend()
            told = run.wait(lambda at=process.pid: run.said(f"(pid {at}) is stopped"), TOLD_SECONDS)  # type: ignore[misc]
            when, line = run.said(f"(pid {process.pid}) is stopped") or (0.0, "")
            process.resume()
            on = run.wait(lambda: run.said("continues after"), END_SECONDS)
            seconds = f"{when - run.at:.0f}" if told else "-"
            yield (
                f"| SIGSTOP of the {name} | {seconds} | {'continues' if on else 'does not continue'} | 0 | {line} |",
                told and on,
            )
        run.process.send_signal(signal.SIGINT)
        run.wait(lambda: run.process.poll() is not None, END_SECONDS)


def main(arguments: list[str]) -> int:
    """Exit code 1 if a fault was told otherwise than it should be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""], help="faults whose name has one of these texts")
    parser.add_argument("--out", type=Path, help="file to append the rows to as well")
    given = parser.parse_args(arguments)
    wrong = 0

    def show(row: str) -> None:
        print(row, flush=True)
        if given.out:
            with given.out.open("a") as file:
                file.write(f"{row}\n")

    show("| fault | seconds to the sentence | exit code | processes left | sentence |\n|---|---|---|---|---|")
    for fault in FAULTS:
        if any(text in fault.name for text in given.only):
            row, right = measure(fault)
            show(row)
            wrong += not right
    if any(text in "SIGSTOP" for text in given.only):
        for row, right in stops(ROLES):
            show(row)
            wrong += not right
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
