"""Vision-OPD through the real stack: Ray, TransferQueue, verl's trainer, FSDP2, vLLM. One run is shared by its checks.

The second half is about resuming, the teacher included: a run that is interrupted and started again must end
where an uninterrupted one ends. Its twin, a teacher that starts again, is injected where it is cheap: in the engine
(`tests/vopd/backbone/test_engine.py`).
"""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from vopd.backbone import checkpoints, shards
from vopd.common import temporary as scratch
from vopd.config import ROOT
from vopd.evaluation.records import read_records

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

BASE = ROOT / "data" / "miniature" / "base"
TEACHER = shards.teacher_kind("ema:0.05")
RUN_SECONDS = 900
INTERRUPTED = 130
CANARY = "canary12"
TRACKERS = ["logging.tensorboard=true", "logging.wandb=true"]
Overrides = Callable[..., list[str]]


def command(overrides: list[str]) -> list[str]:
    return [sys.executable, "-P", "-m", "vopd", "run", "vision_opd", *overrides]


def start(overrides: list[str], log: Path, **more: str) -> subprocess.Popen[bytes]:
    """The command of a run, its terminal in `log`. It takes Ctrl-C even where the tests run in the background."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command(overrides),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env=os.environ | {"WANDB_MODE": "offline"} | more,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def told(folder: Path, log: Path) -> str:
    """The terminal and the end of the libraries' log, for a failure's message."""
    library_log = folder / "log.txt"
    end = library_log.read_text(errors="replace")[-6000:] if library_log.exists() else "(no log.txt)"
    return f"{log.read_text(errors='replace')[-2000:]}\n{end}"


def finish(process: subprocess.Popen[bytes], seconds: float) -> int:
    """Exit code; a run that does not end is killed with all its processes."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        raise


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics(folder: Path) -> dict[int, dict[str, Any]]:
    """Step -> its line; no step appears twice."""
    steps = lines(folder / "metrics.jsonl")
    assert len({line["step"] for line in steps}) == len(steps)
    return {line["step"]: line for line in steps}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}


def teacher(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(shards.file_of(folder / "checkpoints" / "global_step_4" / "actor", TEACHER, 0))


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


# ---- one run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, overrides_for: Overrides) -> Path:
    """The folder of an uninterrupted run of four updates."""
    place = tmp_path_factory.mktemp("whole")
    folder, log = place / "run", place / "terminal.txt"
    (place / "home").mkdir()
    caches = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    began = time.time()
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as temporary:
        process = start(
            [*overrides_for(folder), *TRACKERS], log, TMPDIR=temporary, HOME=str(place / "home"), XDG_CACHE_HOME=caches,
            MY_API_KEY=f"{CANARY}1", HF_TOKEN=f"{CANARY}2", OPENAI_API_KEY=f"{CANARY}3", WANDB_API_KEY=CANARY * 5,
        )  # fmt: skip
        heard: set[str] = set()
        threading.Thread(target=listen, args=(process.pid, heard), daemon=True).start()
        code = finish(process, RUN_SECONDS)
        left = [*Path(temporary).iterdir(), *scratch.orphans(began)]
    (place / "seen.json").write_text(
        json.dumps({"heard": sorted(heard), "left": [str(path) for path in left]})
    )
    assert code == 0, told(folder, log)
    return folder


def listen(pid: int, heard: set[str]) -> None:
    """Collect the addresses at which the process and those below it listen, until it ends."""
    while psutil.pid_exists(pid):
        with contextlib.suppress(psutil.Error):
            tree = {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
            found = [
                c for c in psutil.net_connections("tcp") if c.pid in tree and c.status == psutil.CONN_LISTEN
            ]
            heard.update(c.laddr.ip for c in found)
        time.sleep(0.5)


def test_a_run_listens_at_the_loopback_alone(finished: Path) -> None:
    """The trainer, Ray's daemons, vLLM, TransferQueue; on a machine that has other addresses, or this says nothing."""
    heard = json.loads((finished.parent / "seen.json").read_text())["heard"]
    others = {
        a.address for found in psutil.net_if_addrs().values() for a in found if a.family == socket.AF_INET
    }
    assert heard and set(heard) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    if others == {"127.0.0.1"}:
        pytest.skip("this machine has no address but the loopback")


def test_a_run_leaves_nothing_outside_its_folder(finished: Path) -> None:
    assert json.loads((finished.parent / "seen.json").read_text())["left"] == []
    # matplotlib makes its folder of settings, empty, wherever it is imported.
    home = [path for path in (finished.parent / "home").rglob("*") if path.is_file()]
    assert home == []


def test_no_secret_of_the_environment_is_in_any_file(finished: Path) -> None:
    files = [path for path in finished.parent.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    files = """
        config.yaml verl_config.yaml metrics.jsonl evaluations.jsonl summary.json summary.txt log.txt
        records/before.jsonl records/after.jsonl plots/training.png plots/accuracy.png
        model/config.json model/model.safetensors model/tokenizer.json
        checkpoints/global_step_4/manifest.json checkpoints/global_step_4/actor/weights_rank_0.safetensors
    """.split()
    assert [name for name in files if not (finished / name).is_file()] == []
    assert [name for name in files if (finished / name).stat().st_size == 0] == []
    assert not (finished / "failure.json").exists()
    config = OmegaConf.load(finished / "config.yaml")
    assert (config.recipe, config.train.steps, config.method.top_k) == ("vision_opd", 4, 20)
    assert lines(finished / "evaluations.jsonl")[-1]["name"] == "after"


def test_every_update_is_finite_and_rollout_and_trainer_agree(finished: Path) -> None:
    steps = metrics(finished)
    assert sorted(steps) == [1, 2, 3, 4]
    for step, line in steps.items():
        numbers = {k: v for k, v in line.items() if isinstance(v, int | float)}
        assert [k for k, v in numbers.items() if not math.isfinite(v)] == [], f"step {step}"
        assert line["rollouts"] == 16 and line["prompts"] == 8
        assert line["skipped_updates"] == 0
        assert line["loss"] > 0 and line["divergence"] > 0 and line["grad_norm"] > 0
        assert 0.5 < line["student_mass"] <= 1 and 0 < line["teacher_mass"] <= 1
        assert 0 <= line["rollout/probs_diff"] <= line["rollout/probs_diff_max"] <= 1
        assert {
            "seconds/gen",
            "seconds/update_actor",
            "seconds/update_weights",
            "seconds/step",
        } <= line.keys()
        assert abs(line["rollout/k3"]) < 1e-6  # both compute in float32 on a CPU


def test_verls_trackers_write_into_the_run_folder(finished: Path) -> None:
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    assert list((finished / "wandb").glob("offline-run-*/*.wandb"))
    assert not (ROOT / "tensorboard_log").exists() and not (ROOT / "wandb").exists()


def test_records_answer_every_question_before_and_after(finished: Path) -> None:
    asked = []
    for name in ("before", "after"):
        file = read_records(finished / "records" / f"{name}.jsonl")
        assert file.torn == 0
        asked.append(sorted((r.split, r.view, r.id) for r in file.records))
        assert {r.view for r in file.records if r.split == "test"} == {"full", "crop"}
        assert all(r.prompt and r.response_tokens > 0 for r in file.records)
        assert any(r.parsed for r in file.records)
    assert asked[0] == asked[1]
    assert len(asked[0]) == 24 * 2 + 12


def test_the_summary_states_what_was_run(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert [row["name"] for row in summary["rows"]] == ["full", "crop", "gap", "hold-out"]
    assert summary["cost"]["updates"] == 4 and summary["cost"]["rollouts"] == 64
    assert summary["cost"]["tokens_generated"] == sum(
        m["tokens_generated"] for m in metrics(finished).values()
    )
    assert summary["run"]["settings"]["train"]["steps"] == 4
    assert summary["run"]["method"]["anchor"] == "ema(0.05) on crop"
    assert {"code", "data_hash", "model_hash", "libraries"} <= summary["run"].keys()


def test_the_exported_folder_loads_and_holds_other_weights_than_the_base(finished: Path) -> None:
    trained = AutoModelForImageTextToText.from_pretrained(finished / "model", dtype=torch.float32)
    base = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32)
    AutoProcessor.from_pretrained(finished / "model")
    before, after = dict(base.named_parameters()), dict(trained.named_parameters())
    assert before.keys() == after.keys()
    assert all(bool(torch.isfinite(p).all()) for p in after.values())
    still = [name for name, p in after.items() if torch.equal(p, before[name])]
    assert len(still) < len(after) / 10, f"did not move: {still}"


def test_a_checkpoint_is_exported_to_the_model_of_the_run(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    overrides = [str(finished / "checkpoints" / "global_step_4"), str(out), "--dtype", "float32"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "vopd", "export", *overrides], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {
        f.name: f.read_bytes() for f in (finished / "model").iterdir()
    }


def test_the_teacher_lies_between_the_base_and_the_student(finished: Path) -> None:
    base, student = weights(BASE), weights(finished / "model")
    shards = {name: shard for name, shard in teacher(finished).items() if name in student}
    assert len(shards) > 50 and all(shard.dtype == torch.float32 for shard in shards.values())

    def distance(other: dict[str, torch.Tensor]) -> float:
        return math.sqrt(sum(float((shard - other[name]).square().sum()) for name, shard in shards.items()))

    moved, behind = distance(base), distance(student)
    assert 0 < moved < behind  # rate 0.05, four updates: much nearer to the base


def test_the_same_command_again_shows_the_result_and_trains_nothing(
    finished: Path, overrides_for: Overrides
) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    overrides = [*overrides_for(finished), *TRACKERS]
    again = subprocess.run(command(overrides), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "finished before" in again.stdout and "hold-out" in again.stdout
    assert (finished / "metrics.jsonl").read_bytes() == before


# ---- interrupted and resumed ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, overrides_for: Overrides, finished: Path) -> Path:
    """The folder of a run with the settings of `finished`, interrupted after its first update, started again.

    It would save no checkpoint before its end, so the one that it resumes from is that of the interruption.
    """
    place = tmp_path_factory.mktemp("resumed")
    folder, log = place / "run", place / "terminal.txt"
    process = start(overrides_for(folder, "train.save_every=0"), log)
    tree = interrupt_after(process, folder, 1, log)
    assert finish(process, 120) == INTERRUPTED, told(folder, log)
    _, alive = psutil.wait_procs(tree, timeout=20)
    left = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert left == [], "processes outlive an interrupted run"
    assert not (folder / "summary.json").exists() and not (folder / "model").exists()
    (checkpoint,) = checkpoints.found(folder / "checkpoints")
    assert checkpoint.step == max(metrics(folder)) < 4, "the run was over before it could be interrupted"
    assert f"the same command resumes it from update {checkpoint.step}" in log.read_text()
    code = finish(start(overrides_for(folder), log), RUN_SECONDS)
    assert code == 0, told(folder, log)
    return folder


def interrupt_after(
    process: subprocess.Popen[bytes], folder: Path, step: int, log: Path
) -> list[psutil.Process]:
    """Ctrl-C once the line of `step` is written; returns the processes there were."""
    end = time.monotonic() + RUN_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, told(folder, log)
        if (folder / "metrics.jsonl").exists() and step in metrics(folder):
            tree = psutil.Process(process.pid).children(recursive=True)
            os.kill(process.pid, signal.SIGINT)
            return tree
        time.sleep(0.05)
    finish(process, 0)
    raise AssertionError(told(folder, log))


def test_resume_makes_the_same_updates(finished: Path, resumed: Path) -> None:
    """To the bit, but for what a clock decides: seconds, memory, and which requests vLLM computed together."""
    first, second = metrics(finished), metrics(resumed)
    assert sorted(first) == sorted(second) == [1, 2, 3, 4]
    for step in first:
        keys = [key for key in first[step] if not key.startswith(("seconds/", "perf/", "rollout/"))]
        assert {k: first[step][k] for k in keys} == {k: second[step][k] for k in keys}, f"step {step}"


def test_resume_ends_with_the_same_student_and_teacher(finished: Path, resumed: Path) -> None:
    assert largest_difference(weights(finished / "model"), weights(resumed / "model")) == 0
    assert largest_difference(teacher(finished), teacher(resumed)) == 0


def test_resume_twin_a_teacher_that_never_moved_is_seen(finished: Path) -> None:
    base, reset = weights(BASE), teacher(finished)
    reset = {name: base.get(name, shard) for name, shard in reset.items()}
    assert largest_difference(teacher(finished), reset) > 1e-6
