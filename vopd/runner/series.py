"""`vopd compare [RECIPE...] [seeds=0,1,2] [key=value ...]`: several recipes and seeds, then one comparison.

Without recipes: all methods. Each run is what `bash scripts/run_recipe.sh RECIPE seed=K key=value ...` does, in a
process and a run folder of its own, one after the other. A finished run is reused if its settings and all that it was
made from (`vopd/common/fingerprint.py`) are those of now; otherwise the difference is named, the old folder is moved to
`replaced/` beside it, and the run is made again. A run that fails does not stop the others. After Ctrl-C the same
command resumes.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from yaml import YAMLError

from vopd.common import fingerprint
from vopd.common.caches import results_folder
from vopd.common.command import INTERRUPTED, reports_errors
from vopd.common.terminal import Terminal
from vopd.config import RECIPES
from vopd.errors import UserError
from vopd.report.run_folders import REPLACED
from vopd.runner import run_fingerprint, supervisor
from vopd.runner.run import Run
from vopd.runner.run_folder import RunFolder

KEPT_BACK = ("seed", "run_dir")
MOST_SEEDS = 100


@dataclass(frozen=True)
class Job:
    """One run to have: what to start it with, where it lands, what must be equal for a reuse."""

    recipe: str
    seed: int
    arguments: list[str]
    folder: Path
    settings: dict[str, Any]
    origin: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """What is to be done for a job. state: `reuse`, `resume`, `run` or `run again`; why: what differs."""

    job: Job
    state: str
    why: str = ""


Start = Callable[[Job], int]
"""Runs a job to its end and returns its exit code."""


def parse_arguments(arguments: Sequence[str]) -> tuple[list[str], list[int], list[str]]:
    """Recipes, seeds and the settings for every run.

    Raises:
        UserError: seeds that are not numbers, or a setting that every run must have for itself.
    """
    recipes = [argument for argument in arguments if "=" not in argument]
    settings = [argument for argument in arguments if "=" in argument and not argument.startswith("seeds=")]
    for argument in settings:
        if (key := argument.split("=", 1)[0]) in KEPT_BACK:
            raise UserError(
                f"'{argument}': every run has its own {key}; use seeds=0,1,2, and VOPD_RUNS for the folder."
            )
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    return list(dict.fromkeys(recipes or known)), _seeds(arguments), settings


def _seeds(arguments: Sequence[str]) -> list[int]:
    named = [argument.removeprefix("seeds=") for argument in arguments if argument.startswith("seeds=")]
    if len(named) > 1:
        raise UserError(f"seeds= is given twice ({' and '.join(named)}); give one list.")
    numbers = (named or ["0,1,2"])[0].split(",")
    if not all(number.isascii() and number.isdecimal() and len(number) <= 10 for number in numbers):
        raise UserError(
            f"seeds={named[0]} is not understood; give numbers joined by commas, such as seeds=0,1,2."
        )
    seeds = sorted({int(number) for number in numbers})
    if len(seeds) > MOST_SEEDS:
        raise UserError(f"seeds= names {len(seeds)} seeds; a comparison takes at most {MOST_SEEDS}.")
    return seeds


def jobs(recipes: Sequence[str], seeds: Sequence[int], settings: Sequence[str]) -> list[Job]:
    """All runs, seed by seed, so that an early stop leaves every method with the first seeds.

    Raises:
        UserError: an unknown recipe or setting, or data that cannot be made.
    """
    found: list[Job] = []
    for seed in seeds:
        for recipe in recipes:
            run = Run(recipe, [*settings, f"seed={seed}"], Terminal())
            if run.folder in {job.folder for job in found}:
                continue  # two names of one recipe
            if not found:  # the data is the same for all of them
                results_folder(run.folder, "another place in VOPD_RUNS")
                run.prepare_data()
            config: Any = OmegaConf.to_container(run.config, resolve=True)
            origin = run_fingerprint.of(run)
            found.append(Job(recipe, seed, [recipe, *settings, f"seed={seed}"], run.folder, config, origin))
    return found


def plan(job: Job) -> Plan:
    """Whether the job's folder holds the run already, half of it, another one, or nothing."""
    summary, config = job.folder / "summary.json", job.folder / "config.yaml"
    if summary.is_file():
        try:
            facts = json.loads(summary.read_text(encoding="utf-8"))["run"]
            why = _differs(job, facts["settings"], facts.get("fingerprint"))
        except (ValueError, KeyError, TypeError, AttributeError):
            return Plan(job, "run again", "its summary.json cannot be read")
        return Plan(job, "run again", why) if why else Plan(job, "reuse")
    if not RunFolder(job.folder).has_results():
        return Plan(job, "run")
    try:
        why = _differs(job, OmegaConf.load(config), fingerprint.read(job.folder))
    except (OSError, ValueError, AttributeError, YAMLError):
        return Plan(job, "run again", "unfinished, and its config.yaml cannot be read")
    return Plan(job, "run again", f"unfinished, {why}") if why else Plan(job, "resume")


def _differs(job: Job, settings: Any, recorded: dict[str, str] | None) -> str:
    """The first setting that decides a result and differs, or else what the run was made from; empty for none."""
    changed = fingerprint.differences(
        run_fingerprint.settings(settings), run_fingerprint.settings(job.settings)
    )
    return f"another {sorted(changed)[0]}" if changed else fingerprint.why(recorded, job.origin)


def estimate(plans: Sequence[Plan]) -> str:
    """Time and disk of what is to be run, from finished runs of the same profile and number of updates."""
    waiting = [p.job for p in plans if p.state != "reuse"]
    if not waiting:
        return "nothing to run"
    seconds: dict[str, list[float]] = {}
    sizes: list[int] = []
    top = waiting[0].folder.parent.parent
    for file in top.glob("**/summary.json"):
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))["run"]
            same = facts["settings"]["train"]["steps"] == waiting[0].settings["train"]["steps"]
            if same and facts["profile"] == waiting[0].settings["profile"]:
                seconds.setdefault(str(facts["recipe"]), []).append(float(facts["wall_seconds"]))
                sizes.append(sum(f.stat().st_size for f in file.parent.rglob("*") if f.is_file()))
        except (ValueError, KeyError, TypeError):
            continue  # not the summary of a run; the plan says what is wrong with those of this series
    if not seconds:
        return "time and disk are unknown: no run of this profile and length has been finished here"
    every = [value for values in seconds.values() for value in values]
    total = sum(_mean(seconds.get(job.settings["recipe"], every)) for job in waiting)
    guessed = {job.recipe for job in waiting if job.settings["recipe"] not in seconds}
    note = f"; {', '.join(sorted(guessed))} by the mean of the others" if guessed else ""
    disk = len(waiting) * _mean(sizes) / 2**20
    return f"about {total / 60:.0f} minutes and {disk:,.0f} MiB of disk, by {len(every)} finished runs{note}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def run(arguments: Sequence[str], start: Start, console: Console) -> int:
    """Plan, print the plan, run what is missing, compare; the exit code.

    Raises:
        UserError: bad arguments, settings or data; or runs that cannot be compared.
        KeyboardInterrupt: a run was interrupted; what is finished stays.
    """
    recipes, seeds, settings = parse_arguments(arguments)
    plans = [plan(job) for job in jobs(recipes, seeds, settings)]
    for p in plans:
        console.print(
            f"{p.state:<10} {p.job.recipe}, seed {p.job.seed}" + (f": {p.why}" if p.why else ""),
            soft_wrap=True,
        )
    console.print(estimate(plans), soft_wrap=True)
    failed = [
        p.job for n, p in enumerate(plans, 1) if not _have(p, start, console, f"run {n} of {len(plans)}")
    ]
    good = [p.job.folder for p in plans if p.job not in failed]
    code = 1 if failed else 0
    if good:
        out = good[0].parents[1] / "report"
        from vopd.report import __main__ as report  # slow to import

        code = max(code, report.main([*map(str, good), f"out={out}"]))
    for job in failed:
        console.print(f"failed: {job.recipe}, seed {job.seed}; see {job.folder / 'log.txt'}", soft_wrap=True)
    return code


def _have(p: Plan, start: Start, console: Console, place: str) -> bool:
    """Make sure that the run is there; False if it failed."""
    if p.state == "reuse":
        return True
    console.rule(f"{place}: {p.job.recipe}, seed {p.job.seed}")
    if p.state == "run again":
        console.print(f"the old run is in {move_aside(p.job.folder)}", soft_wrap=True)
    code = start(p.job)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code == 0


def move_aside(folder: Path) -> Path:
    """Move a run folder to `replaced/<name>-<n>` beside it; returns where it is. Nothing is copied or merged.

    Raises:
        UserError: it cannot be moved; it is where it was.
    """
    place = folder.parent / REPLACED
    try:
        place.mkdir(exist_ok=True)
        taken = {path.name for path in place.iterdir()}
        number = next(n for n in count(1) if f"{folder.name}-{n}" not in taken)
        return folder.rename(place / f"{folder.name}-{number}")
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be moved to {place} ({error.strerror}); move it yourself."
        ) from error


class Terminated(KeyboardInterrupt):
    """SIGTERM: unlike Ctrl-C at a terminal it has reached this process alone."""


def start_run(job: Job) -> int:
    """The run as a process of its own. It ends its training tidily when it is interrupted, and is waited for."""
    child = subprocess.Popen(supervisor.python("-m", "vopd", "run", *job.arguments))
    try:
        return child.wait()
    except Terminated:
        child.terminate()
        child.wait()
        raise
    except KeyboardInterrupt:  # it has got the signal too; a second one would cut its tidying short
        child.wait()
        raise


def _terminate(*_: Any) -> None:
    raise Terminated


@reports_errors(interrupted="the same command resumes where it was")
def main(arguments: Sequence[str]) -> int:
    """Exit code 0, 1 if a run failed, 2 for bad input, 130 after Ctrl-C."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    return run(arguments, start_run, Terminal())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main(sys.argv[1:]))
