"""A series of runs with a stand-in for the run command: what is reused, run again, gone on with, and what fails."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from vopd.common import fingerprint, provenance
from vopd.config import ROOT
from vopd.errors import UserError
from vopd.evaluation import statistics
from vopd.report import __main__ as report
from vopd.report import archive
from vopd.runner import new_recipe, run_fingerprint
from vopd.runner import series as compare
from vopd.runner.run import Run
from vopd.runner.series import Job

ARGUMENTS = ["grpo", "dapo", "seeds=0,1"]


@pytest.fixture
def synthetic() -> ModuleType:
    """The generator of made-up runs of the report's tests."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("synthetic", Path(__file__).parents[1] / "report" / "synthetic.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Series:
    """compare.run with a stand-in that leaves a finished run; `started` counts, `fails` maps a recipe to exit codes."""

    def __init__(self, synthetic: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synthetic = synthetic
        self.report = report.main
        self.compared: list[str] = []
        monkeypatch.setattr(report, "main", self.compare)
        self.started: list[tuple[str, int]] = []
        self.fails: dict[str, int] = {}
        self.output = ""

    def start(self, job: Job) -> int:
        self.started.append((job.recipe, job.seed))
        job.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(job.settings), job.folder / "config.yaml")
        fingerprint.write(job.folder, job.origin)
        if code := self.fails.get(job.recipe):
            return code
        self.synthetic.make_run(
            job.folder.parents[1], job.folder.parent.name, job.seed, fixed=0.3, settings=job.settings,
            fingerprint=job.origin, data_hash=job.origin["data"], model_hash=job.origin["base model"],
        )  # fmt: skip
        return 0

    def compare(self, arguments: list[str]) -> int:
        """Note what would be compared: the report itself has tests of its own, and takes seconds."""
        self.compared = arguments
        return 0

    def __call__(self, *arguments: str) -> int:
        self.started.clear()
        console = Console(highlight=False, width=300, record=True)
        try:
            return compare.run(arguments or ARGUMENTS, self.start, console)
        finally:
            self.output = console.export_text()


@pytest.fixture
def series(synthetic: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Series:
    """Runs land in tmp_path; data and model are named by two variables instead of being hashed."""
    monkeypatch.setenv("VOPD_RUNS", str(tmp_path))
    monkeypatch.setattr(statistics, "RESAMPLES", 199)
    monkeypatch.setattr(Run, "prepare_data", lambda self: None)
    monkeypatch.setattr(Run, "data_hash", lambda self: "da7a")
    monkeypatch.setattr(Run, "model_hash", lambda self: "ba5e")
    return Series(synthetic, monkeypatch)


def test_every_recipe_and_seed_is_run_and_compared(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "main", series.report)
    assert series() == 0
    assert series.started == [("grpo", 0), ("dapo", 0), ("grpo", 1), ("dapo", 1)]
    assert "time and disk are unknown" in series.output
    assert "Methods: accuracy" in capsys.readouterr().out
    assert (tmp_path / "miniature" / "report" / "report.html").is_file()


def test_two_names_of_one_recipe_are_one_run(series: Series) -> None:
    assert (
        series("vision_opd", "ablations/vision_opd_jsd", "ablations/vision_opd_teacher_ema", "seeds=0") == 0
    )
    assert series.started == [("vision_opd", 0)]


def test_finished_runs_are_reused_and_the_rest_estimated_from_them(series: Series) -> None:
    series("grpo", "seeds=0")
    assert series() == 0
    assert series.started == [("dapo", 0), ("grpo", 1), ("dapo", 1)]
    assert "reuse      grpo, seed 0" in series.output
    assert "about 3 minutes" in series.output  # 60 seconds stand in the stand-in's summary
    assert "by 1 finished runs; dapo by the mean of the others" in series.output
    assert series() == 0
    assert series.started == [] and "nothing to run" in series.output


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda m: m.setattr(run_fingerprint, "training", lambda: [ROOT / "vopd" / "runner" / "run.py"]),
            "another code ",
        ),
        (lambda m: m.setattr(Run, "data_hash", lambda self: "new"), "another data"),
        (lambda m: m.setattr(Run, "model_hash", lambda self: "new"), "another base model"),
    ],
)
def test_what_differs_is_said_and_the_old_run_moved_aside(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    change: Callable[[pytest.MonkeyPatch], None], said: str,
) -> None:  # fmt: skip
    series("grpo", "seeds=0")
    change(monkeypatch)
    assert series("grpo", "seeds=0") == 0
    assert series.started == [("grpo", 0)]
    assert f"run again  grpo, seed 0: {said}" in series.output
    old = tmp_path / "miniature" / "grpo" / "replaced" / "seed0-1"
    assert (old / "summary.json").is_file()
    assert str(old) in series.output


def test_another_setting_runs_again(series: Series) -> None:
    series("grpo", "seeds=0")
    assert series("grpo", "seeds=0", "train.lr=1e-3") == 0
    assert "run again  grpo, seed 0: another train.lr" in series.output


def test_a_run_of_another_checkout_or_a_kept_record_is_reused(series: Series, tmp_path: Path) -> None:
    series("grpo", "seeds=0")
    file = tmp_path / "miniature" / "grpo" / "seed0" / "summary.json"
    summary = json.loads(file.read_text())
    here = summary["run"]["settings"]
    for place in ("/elsewhere/checkout", None):
        moved = archive.without_places(here, ROOT)
        if place:
            moved["recipe_folder"], moved["model"]["path"] = (
                f"{place}/recipes",
                f"{place}/data/miniature/base",
            )
            moved["data"]["folder"] = f"{place}/.cache/miniature"
        assert moved["recipe_folder"] != here["recipe_folder"]
        file.write_text(json.dumps({**summary, "run": {**summary["run"], "settings": moved}}))
        assert series("grpo", "seeds=0") == 0
        assert series.started == [] and "reuse      grpo, seed 0" in series.output


def test_a_recipe_outside_the_repository_is_known_by_what_it_holds(series: Series, tmp_path: Path) -> None:
    for place in ("a", "b"):
        new_recipe.new("mine", tmp_path / place)
    assert series(str(tmp_path / "a" / "mine.yaml"), "seeds=0") == 0
    assert series(str(tmp_path / "b" / "mine.yaml"), "seeds=0") == 0
    assert series.started == [] and "reuse " in series.output
    with (tmp_path / "b" / "mine.py").open("a") as file:
        file.write("# another line\n")
    assert series(str(tmp_path / "b" / "mine.yaml"), "seeds=0") == 0
    assert "seed 0: another recipe module mine.py" in series.output and len(series.started) == 1


@pytest.mark.parametrize("facts", [{}, {"fingerprint": None}, {"fingerprint": {}}])
def test_a_finished_run_of_unknown_code_is_made_again(
    series: Series, tmp_path: Path, facts: dict[str, None]
) -> None:
    series("grpo", "seeds=0")
    file = tmp_path / "miniature" / "grpo" / "seed0" / "summary.json"
    summary = json.loads(file.read_text())
    del summary["run"]["fingerprint"]
    file.write_text(json.dumps(summary | {"run": summary["run"] | facts}))
    assert series("grpo", "seeds=0") == 0
    assert f"run again  grpo, seed 0: {fingerprint.UNKNOWN}" in series.output


def test_a_failing_run_stops_nothing_and_is_named(series: Series, tmp_path: Path) -> None:
    series.fails["dapo"] = 1
    assert series() == 1
    assert len(series.started) == 4
    assert "failed: dapo, seed 0" in series.output and "failed: dapo, seed 1" in series.output
    folder = tmp_path / "miniature"
    assert series.compared == [
        *(str(folder / "grpo" / f"seed{k}") for k in (0, 1)),
        f"out={folder / 'report'}",
    ]
    del series.fails["dapo"]
    assert series() == 0
    assert series.started == [("dapo", 0), ("dapo", 1)]


def test_an_interrupted_series_resumes(series: Series, tmp_path: Path) -> None:
    series.fails["dapo"] = 130
    with pytest.raises(KeyboardInterrupt):
        series()
    assert series.started == [("grpo", 0), ("dapo", 0)]
    half = tmp_path / "miniature" / "dapo" / "seed0"
    (half / "metrics.jsonl").write_text('{"step": 1}\n')
    series.fails.clear()
    assert series() == 0
    assert series.started == [("dapo", 0), ("grpo", 1), ("dapo", 1)]
    assert "resume     dapo, seed 0" in series.output and not half.with_name("replaced").exists()


def test_an_unfinished_run_of_other_or_unknown_code_begins_anew(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = tmp_path / "miniature" / "grpo" / "seed0"
    series.fails["grpo"] = 1
    series("grpo", "seeds=0")
    (half / "metrics.jsonl").write_text('{"step": 1}\n')
    series.fails.clear()
    monkeypatch.setattr(provenance, "version", lambda name: "another")
    assert series("grpo", "seeds=0") == 0
    assert "grpo, seed 0: unfinished, another library " in series.output
    (half / "summary.json").unlink()
    (half / fingerprint.FILE).unlink()
    assert series("grpo", "seeds=0") == 0
    assert f"unfinished, {fingerprint.UNKNOWN}" in series.output
    assert len(list(half.with_name("replaced").iterdir())) == 2


def test_without_words_all_methods_and_three_seeds() -> None:
    recipes, seeds, settings = compare.parse_arguments([])
    assert recipes == ["dapo", "grpo", "opsd", "opsd_original", "sft_self_teacher", "vision_opd"]
    assert (seeds, settings) == ([0, 1, 2], [])
    assert compare.parse_arguments(["grpo", "seeds=4", "train.steps=9"]) == (["grpo"], [4], ["train.steps=9"])


@pytest.mark.parametrize("argument", ["seeds=a", "seeds=", "seed=1", "run_dir=x"])
def test_refused_arguments(argument: str) -> None:
    with pytest.raises(UserError):
        compare.parse_arguments([argument])


def test_unknown_recipes_and_settings_are_refused_before_anything_starts(series: Series) -> None:
    for arguments in (["nothing"], ["grpo", "train.stepz=3"]):
        with pytest.raises(UserError):
            series(*arguments)
        assert series.started == []


def test_bad_input_ends_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["seeds=x"]) == 2
    assert "seeds=x" in capsys.readouterr().err


TIDIES = """
import signal, sys, time
def tidy(*_):
    time.sleep(0.2)
    print("tidied", flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, tidy)
signal.signal(signal.SIGTERM, tidy)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_waited_out_until_the_run_has_tidied_up(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM reaches the series alone, Ctrl-C its run as well: the run gets exactly one signal either way."""
    children = []
    popen = subprocess.Popen

    def start(command: list[str]) -> subprocess.Popen[str]:
        children.append(popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True))
        return children[0]

    def strike() -> None:
        while not children:
            time.sleep(0.01)
        assert children[0].stdout.readline() == "ready\n"
        if number == signal.SIGINT:
            children[0].send_signal(number)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(compare.supervisor, "python", lambda *arguments: [sys.executable, "-c", TIDIES])
    monkeypatch.setattr(compare.subprocess, "Popen", start)
    # As python starts: pytest-xdist's workers leave Ctrl-C to their controller.
    usual = [
        (signal.SIGTERM, signal.signal(signal.SIGTERM, compare._terminate)),
        (signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler)),
    ]
    striking = threading.Thread(target=strike)
    striking.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            compare.start_run(Job("x", 0, [], Path(), {}, {}))
    finally:
        for which, handler in usual:
            signal.signal(which, handler)
        striking.join()
    assert children[0].returncode == 130
    assert children[0].stdout.read() == "tidied\n"


def test_what_is_moved_aside_is_never_merged_or_lost(tmp_path: Path) -> None:
    for n in (1, 2, 3):
        (tmp_path / "seed0").mkdir()
        (tmp_path / "seed0" / "notes").write_text(str(n))
        if n == 2:
            (tmp_path / "replaced" / "seed0-2").symlink_to(tmp_path / "nowhere")
        compare.move_aside(tmp_path / "seed0")
    found = {f.name: (f / "notes").read_text() for f in (tmp_path / "replaced").iterdir() if f.is_dir()}
    assert found == {"seed0-1": "1", "seed0-3": "2", "seed0-4": "3"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "replaced").write_text("mine")
    (tmp_path / "other" / "seed0").mkdir()
    with pytest.raises(UserError, match="cannot be moved"):
        compare.move_aside(tmp_path / "other" / "seed0")
    assert (tmp_path / "other" / "replaced").read_text() == "mine"
