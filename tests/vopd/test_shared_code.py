"""Shared code knows no method: no method's name in it, no branch on a value outside the documented contract."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from vopd import method as contract
from vopd.config import ROOT
from vopd.views import VIEWS

METHODS = [*(ROOT / "baselines").glob("[a-z]*.py"), *(ROOT / "vopd").glob("vision_opd*.py")]
RECIPES = [file for file in (ROOT / "recipes").rglob("*.yaml") if file.parent.name != "profiles"]
NAMES = {file.stem for file in [*METHODS, *RECIPES]} | {"sft"}
SHARED = [f for folder in ("vopd", "data") for f in (ROOT / folder).rglob("*.py") if f not in METHODS]
# Not ours: verl's estimator and its buffer. Ours, and harmless: the example that --help prints, the published data.
ALLOWED = {
    ("vopd/method.py", "grpo"),
    ("vopd/backbone/verl_internals.py", "dapo"),
    ("vopd/runner/run.py", "vision_opd"),
    ("data/vision_opd_6k", "vision_opd"),
    ("data/folders.py", "vision_opd"),
    ("vopd/cli.py", "vision_opd"),  # the data set
}
VALUES = {
    "weights": {*contract.WEIGHTS, *contract.ROLLOUT_WEIGHTS},
    "view": set(VIEWS),
    "student_view": set(VIEWS),
    "advantage": set(contract.ADVANTAGES),
}


def code(tree: ast.AST) -> Iterator[str]:
    """Identifiers, and strings other than docstrings."""
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings.add(first.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield node.value
        for field in ("id", "attr", "name", "arg", "module"):
            if isinstance(value := getattr(node, field, None), str):
                yield value


def names_in(text: str) -> set[str]:
    pattern = rf"(?<![A-Za-z0-9])({'|'.join(sorted(NAMES, key=len, reverse=True))})(?![A-Za-z0-9])"
    return {found.lower() for found in re.findall(pattern, text, re.IGNORECASE)}


def named(tree: ast.AST) -> set[str]:
    return {name for text in code(tree) for name in names_in(text)}


def foreign_branches(tree: ast.AST) -> set[str]:
    """Comparisons of a contract attribute with a string that is not a value of the contract."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        attributes = {s.attr for s in sides if isinstance(s, ast.Attribute)} & VALUES.keys()
        strings = {c.value for s in sides for c in ast.walk(s) if isinstance(c, ast.Constant)} - {None}
        for attribute in attributes:
            found |= {f"{attribute} {value}" for value in strings - VALUES[attribute]}
    return found


def allowed(file: Path, name: str) -> bool:
    path = file.relative_to(ROOT).as_posix()
    return any(path.startswith(start) and name == word for start, word in ALLOWED)


def test_shared_code_names_no_method() -> None:
    assert len(SHARED) > 40 and {"vision_opd", "grpo", "dapo", "opsd", "sft_self_teacher"} <= NAMES
    found = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in SHARED
        for name in named(ast.parse(file.read_text()))
        if not allowed(file, name)
    }
    assert found == set()


def test_shared_code_branches_on_values_of_the_contract_alone() -> None:
    found = {f"{f.name}: {b}" for f in SHARED for b in foreign_branches(ast.parse(f.read_text()))}
    assert found == set()


@pytest.mark.parametrize(
    "line", ["if recipe == 'dapo': pass", "import baselines.grpo", "def opsd_loss(): pass", "x = 'SFT'"]
)
def test_a_method_named_in_shared_code_is_seen(line: str) -> None:
    assert named(ast.parse(line))


def test_a_branch_outside_the_contract_is_seen() -> None:
    assert foreign_branches(ast.parse("if scorer.weights == 'ema': pass")) == set()
    assert foreign_branches(ast.parse("if scorer.weights in ('ema', 'swa'): pass")) == {"weights swa"}


def test_docstrings_may_tell_where_a_formula_comes_from() -> None:
    assert named(ast.parse('def f():\n    """As in GRPO."""\n    return 1')) == set()
