"""Imports go one way: the rooms of docs/architecture.md, and no circle between files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = ("vopd", "baselines", "data")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for top in TOP
    for path in (ROOT / top).rglob("*.py")
}


def rooms() -> dict[str, tuple[list[str], set[str]]]:
    """Room -> (module prefixes, rooms it may import), from the table in the document."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|", text, re.MULTILINE)
    found = {}
    for name, modules, may in rows:
        found[name] = re.findall(r"`([\w.]+)`", modules), set(re.findall(r"`(\w+)`", may))
    return found


ROOMS = rooms()


def room_of(module: str) -> str:
    """The room with the longest prefix."""
    fits = [
        (len(prefix), name)
        for name, (prefixes, _) in ROOMS.items()
        for prefix in prefixes
        if module == prefix or module.startswith(f"{prefix}.")
    ]
    assert fits, f"{module} is in no room of docs/architecture.md"
    return max(fits)[1]


def imports(tree: ast.AST) -> Iterator[str]:
    """Our modules that a file imports, in functions and for annotations too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else node.module for name in inner]
        else:
            continue
        yield from (name for name in names if name in FILES)


GRAPH = {module: set(imports(ast.parse(path.read_text()))) - {module} for module, path in FILES.items()}


def wrong_ways(graph: dict[str, set[str]]) -> list[str]:
    return sorted(
        f"{module} imports {other}: {room_of(module)} may not import {room_of(other)}"
        for module, others in graph.items()
        for other in others
        if room_of(other) != room_of(module) and room_of(other) not in ROOMS[room_of(module)][1]
    )


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty if there is none. Packages' own files are left out."""
    state: dict[str, int] = {}

    def visit(module: str, path: list[str]) -> list[str]:
        state[module] = 1
        for other in sorted(graph.get(module, ())):
            if state.get(other) == 1:
                return [*path[path.index(other) :], other] if other in path else [module, other]
            if other not in state and (found := visit(other, [*path, other])):
                return found
        state[module] = 2
        return []

    for module in sorted(graph):
        if module not in state and (found := visit(module, [module])):
            return found
    return []


def test_every_module_is_in_a_room_and_every_room_has_modules() -> None:
    assert len(ROOMS) > 8
    assert {room_of(module) for module in FILES} == set(ROOMS)


def test_imports_go_where_the_picture_says() -> None:
    assert wrong_ways(GRAPH) == []


def test_rooms_do_not_import_each_other() -> None:
    assert circle({name: may & set(ROOMS) for name, (_, may) in ROOMS.items()}) == []


def test_no_circle_between_files() -> None:
    assert circle(GRAPH) == []


@pytest.mark.parametrize(
    ("module", "other"),
    [("vopd.method", "vopd.backbone.head"), ("vopd.evaluation.asking", "vopd.backbone.launch")],
)
def test_twin_a_wrong_way_and_a_circle_are_seen(module: str, other: str) -> None:
    graph = GRAPH | {module: GRAPH[module] | {other}}
    assert any(line.startswith(f"{module} imports {other}") for line in wrong_ways(graph))
    assert circle(GRAPH | {"vopd.common.paths": {"vopd.common.caches"}})


def test_what_reads_nothing_but_cpus_need_lies_in_one_folder() -> None:
    assert [path.name for path in (ROOT / "vopd").glob("vllm_*.py")] == []
    named = [path for path in (ROOT / "vopd").rglob("*cpu*.py") if "cpu" not in path.parent.name]
    assert named == []
