"""Results and caches of other inputs than now's, and places that cannot be written."""

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.bad_inputs import Case
from vopd.config import load
from vopd.runner.run_folder import RunFolder

RUN = ["vision_opd", "data.prepare=null"]


def finished(summary: str) -> Callable[[Path], list[str]]:
    """The arguments of a run whose folder holds this summary."""

    def arguments(folder: Path) -> list[str]:
        (folder / "run").mkdir()
        RunFolder(folder / "run").write_settings(load("vision_opd", [item for item in RUN if "=" in item]))
        (folder / "run" / "summary.json").write_text(summary)
        (folder / "run" / "summary.txt").write_text("the old result\n")
        return [*RUN, f"run_dir={folder / 'run'}"]

    return arguments


def below_a_file(folder: Path) -> list[str]:
    return [*RUN, f"run_dir={a_file(folder)}/run"]


def a_file(folder: Path) -> str:
    (folder / "file").write_text("")
    return str(folder / "file")


def evaluation(folder: Path) -> list[str]:
    """Overrides that evaluate one question of a user-defined benchmark, through a server that is never asked."""
    (folder / "set").mkdir()
    (folder / "set" / "own.jsonl").write_text('{"question": "Is it?", "answer": "yes", "image": "aGk="}\n')
    (folder / "own.yaml").write_text(
        f"title: Own\nfolder: {folder / 'set'}\nfiles: own.jsonl\nrows: 1\nlicence: none\nanswer_type: yes/no\n"
        "official_rule: none\nprompt: '{question}'\ncolumns:\n  image: image\n  question: question\n  answer: answer\n"
    )
    server = "http://127.0.0.1:9/v1"
    return ["model=m", f"benchmarks=[{folder / 'own.yaml'}]", f"endpoint={server}", "views=[full]"]


def unwritable_evaluation(folder: Path) -> list[str]:
    return [*evaluation(folder), f"out={a_file(folder)}/out"]


def old_evaluation(folder: Path) -> list[str]:
    arguments, out = evaluation(folder), folder / "out" / "m" / "own"
    out.mkdir(parents=True)
    (out / "records.jsonl").write_text("")
    (out / "settings.json").write_text(json.dumps({"model": "m", "max_tokens": 7}))
    return [*arguments, f"out={folder / 'out'}"]


CASES = (
    Case(
        "a finished run of unknown code", "vopd.runner.run", finished('{"run": {"code_hash": "c0de"}}'),
        "with which code, data and base model it was made is not known; give another run_dir=...",
    ),
    Case(
        "a finished run whose summary is torn", "vopd.runner.run", finished('{"run": {"fingerp'),
        "is not the summary of a run",
    ),
    Case(
        "a finished run whose summary is another program's", "vopd.runner.run", finished("[1, 2]"),
        "is not the summary of a run",
    ),
    Case(
        "a run_dir below a file", "vopd.runner.run", below_a_file,
        "results cannot be written there (Not a directory); set VOPD_RUNS",
    ),
    Case(
        "VOPD_RUNS that is a file", "vopd.runner.run", lambda folder: RUN,
        "results cannot be written there (Not a directory); set VOPD_RUNS",
        environment={"VOPD_RUNS": a_file},
    ),
    Case(
        "a series whose place is a file", "vopd.runner.series", lambda folder: ["vision_opd", "seeds=0"],
        "set VOPD_RUNS to a folder that can be written",
        environment={"VOPD_RUNS": a_file},
    ),
    Case(
        "an evaluation whose out is below a file", "vopd.evaluation.evaluate", unwritable_evaluation,
        "Not a directory",
    ),
    Case(
        "an evaluation's records without their settings", "vopd.evaluation.evaluate", old_evaluation,
        "not the settings of an evaluation",
    ),
)  # fmt: skip
