"""The command `vopd`: every command helps and refuses without torch, and nothing where the user stands hides ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from vopd import cli
from vopd.common.paths import ROOT

COMMANDS = [
    ("run",), ("check",), ("compare",), ("report",), ("evaluate",), ("compare-models",), ("export",), ("recipe", "new"),
    ("data", "prepare", "miniature"), ("data", "prepare", "vision_opd_6k"), ("data", "validate"),
    ("data", "synthesize"), ("data", "audit"),
]  # fmt: skip
MISTAKES = [
    (("run", "vision_opd", "train.lr=-1"), "train.lr=-1.0 is not allowed"),
    (("run", "vision_opd", "method.beta=2"), "method.beta=2.0 is not allowed"),
    (("run", "grpo", "method.no=2"), "method.no: there is no such setting"),
    (("run", "nothing"), "There is no recipe 'nothing'"),
    (("compare", "vision_opd", "seeds=x"), "seeds=x is not understood"),
    (("evaluate", "model=m", "benchmarks=[vstar]", "seed=-1"), "seed=-1 is not allowed"),
    (("check", "nothing"), "There is no recipe"),
]
WITHOUT_TORCH = """
import sys
from vopd import cli
try:
    cli.cli(sys.argv[1:], prog_name="vopd")
except SystemExit as end:
    code = end.code
assert "torch" not in sys.modules, "torch was imported"
sys.exit(code)
"""


def called(*arguments: str, folder: Path = ROOT, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-m", "vopd"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        capture_output=True, text=True, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_every_command_helps_without_torch(arguments: tuple[str, ...]) -> None:
    done = called(*arguments, "--help", code=WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr
    assert f"vopd {' '.join(arguments)}" in done.stdout
    assert "example" in done.stdout.lower() or "=" in done.stdout or "--" in done.stdout


def test_the_settings_of_a_recipe_are_listed_without_torch() -> None:
    done = called("run", "dapo", "--help", code=WITHOUT_TORCH)
    assert done.returncode == 0 and "clip_high: 0.28" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"), MISTAKES, ids=lambda value: " ".join(value) if value else ""
)
def test_a_mistake_in_the_settings_is_told_without_torch(arguments: tuple[str, ...], sentence: str) -> None:
    done = called(*arguments, code=WITHOUT_TORCH)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr


def test_every_command_is_listed() -> None:
    for arguments in ((), ("data",), ("recipe",)):
        listed = CliRunner().invoke(cli.cli, [*arguments, "--help"]).output
        assert [
            c[len(arguments)]
            for c in COMMANDS
            if c[: len(arguments)] == arguments and c[len(arguments)] not in listed
        ] == []


def test_a_folder_named_data_where_the_user_stands_hides_nothing(tmp_path: Path) -> None:
    for name in ("data", "baselines", "recipes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong one')\n")
    done = called("data", "validate", "--help", folder=tmp_path)
    assert done.returncode == 0 and "usage: vopd data validate" in done.stdout, done.stderr
    done = called("run", "vision_opd", "train.lr=-1", folder=tmp_path)
    assert done.returncode == 2 and "train.lr=-1.0 is not allowed" in done.stderr


def test_settings_are_written_the_same_way_everywhere() -> None:
    arguments = ("data/my set", "out=x=y", "max_prompt_tokens=5", "--model", "m", "a-b=c")
    assert cli._as_options(arguments) == (
        "data/my set", "--out=x=y", "--max-prompt-tokens=5", "--model", "m", "a-b=c",
    )  # fmt: skip


def test_recipes_and_settings_are_completed() -> None:
    def completed(typed: str) -> list[str]:
        parameter = cli.cli.commands["run"].params[0]
        return [item.value for item in parameter.type.shell_complete(None, parameter, typed)]

    assert "vision_opd" in completed("vision") and "train.lr=" in completed("train.")
