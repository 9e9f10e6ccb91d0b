"""`vopd`: one command for everything a user starts, `vopd COMMAND ... key=value ...`.

A command's own module is imported when it is called, so that help costs no library's import. Settings are `key=value`
everywhere (for runs, evaluation and synthesis: Hydra overrides). Tab completion, with recipes and settings:
`eval "$(_VOPD_COMPLETE=bash_source vopd)"` (also zsh_source, fish_source).
"""

from __future__ import annotations

import ast
import importlib.util
import signal
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

HELP = {"help_option_names": ["-h", "--help"]}
# Everything behind the command's name is its module's to read, --help included.
PASS_ON = {"ignore_unknown_options": True, "help_option_names": []}
PREPARERS = {"miniature": "data.miniature.prepare", "vision_opd_6k": "data.vision_opd_6k.prepare"}
DOCUMENTED = (
    "vopd.report.__main__",
    "vopd.evaluation.model_comparison",
    "vopd.runner.series",
    "vopd.runner.check",
    "vopd.runner.export",
)
"""Modules whose help is their docstring, and whose imports take a second."""


class Overrides(click.ParamType):
    """Recipes and settings, for completion; they are read where they are used."""

    name = "overrides"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Names that begin as typed; a setting up to its equals sign."""
        from vopd import config

        keys = [f"{key}=" for key in config.keys()]
        return [CompletionItem(name) for name in [*config.recipes(), *keys] if name.startswith(incomplete)]


def _interrupt(*_: Any) -> None:
    """SIGTERM ends a command the way Ctrl-C does: what it has started must not be left alone."""
    raise KeyboardInterrupt


def _documented(module: str) -> str:
    """A module's docstring, without importing it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""


def _hand_over(module: str, arguments: tuple[str, ...]) -> None:
    if module in DOCUMENTED and {"-h", "--help"} & set(arguments):
        print(_documented(module))
        raise SystemExit(0)
    signal.signal(signal.SIGTERM, _interrupt)
    raise SystemExit(importlib.import_module(module).main(list(arguments)))


def _as_options(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """`key=value` for commands whose module reads --key=value."""
    return tuple(
        f"--{argument.replace('_', '-', argument.partition('=')[0].count('_'))}"
        if _is_setting(argument)
        else argument
        for argument in arguments
    )


def _is_setting(argument: str) -> bool:
    key, equals, _ = argument.partition("=")
    return bool(equals) and key.isidentifier()


def _command(
    group: click.Group, name: str, module: str, about: str, options: bool = False, first: tuple[str, ...] = ()
) -> None:
    """A command that hands its arguments to `main` of a module."""

    @group.command(name, context_settings=PASS_ON, short_help=about, add_help_option=False)
    @click.argument("arguments", nargs=-1, type=Overrides())
    def run(arguments: tuple[str, ...]) -> None:
        _hand_over(module, (*first, *(_as_options(arguments) if options else arguments)))


@click.group(
    context_settings=HELP,
    epilog="Examples: vopd run RECIPE seed=1 | vopd compare RECIPE RECIPE seeds=0,1,2 | "
    "vopd report runs/miniature | vopd evaluate model=FOLDER 'benchmarks=[vstar]'. "
    "`vopd COMMAND --help` lists a command's settings.",
)
def cli() -> None:
    """Compare ways of post-training a multimodal LLM to see small details."""


@cli.group(context_settings=HELP)
def data() -> None:
    """Prepare, check, make and audit triplets."""


@cli.group(context_settings=HELP)
def recipe() -> None:
    """Recipes of your own."""


_command(cli, "run", "vopd.runner.run", "Train and evaluate one recipe: RECIPE|FILE.yaml [key=value ...].")
_command(cli, "check", "vopd.runner.check", "Whether a run could start here: settings, data, model, machine.")
_command(cli, "compare", "vopd.runner.series", "Run recipes over seeds and compare them.")
_command(cli, "report", "vopd.report.__main__", "Tables and a page from finished runs.")
_command(
    cli, "evaluate", "vopd.evaluation.evaluate", "Ask a model a benchmark's questions and score its answers."
)
_command(
    cli, "compare-models", "vopd.evaluation.model_comparison", "Two evaluated models on the same questions."
)
_command(cli, "export", "vopd.runner.export", "A checkpoint as a Hugging Face folder: CHECKPOINT OUT.", True)
_command(recipe, "new", "vopd.runner.new_recipe", "Write a working recipe to start from.", True)
_command(data, "validate", "data.validate", "Check a folder of triplets, and give it its stamp.", True)
_command(data, "synthesize", "data.synthesize", "Make triplets from a folder of images.")
_command(data, "audit", "data.audit", "Whether test images are in the training set.", True)


@data.command("prepare", context_settings=PASS_ON, add_help_option=False)
@click.argument("name", type=click.Choice(list(PREPARERS)))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def prepare(name: str, arguments: tuple[str, ...]) -> None:
    """Make a data set's triplets."""
    _hand_over(PREPARERS[name], _as_options(arguments))


def main() -> None:
    """The console script."""
    cli(prog_name="vopd")
