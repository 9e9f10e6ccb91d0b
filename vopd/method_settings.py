"""The settings of this repository's methods, read without what else their modules import: torch takes a second or more.

So help and refused settings answer at once. A method of the user's own is imported as it is, for its mistakes are to be
told with file and line.
"""

from __future__ import annotations

import ast
import sys
from typing import Any

from vopd.common.paths import ROOT

NEEDED = ("vopd.bounds", "vopd.method", "vopd.views")
"""Modules, beside the standard library's, that a `Settings` takes its defaults, bounds and types from; none imports
torch."""


def alone(module: str) -> type | None:
    """The class `Settings` of a method's module, given by its dotted name; None for one outside this repository."""
    file = ROOT / f"{module.replace('.', '/')}.py"
    if module.endswith(".py") or not file.is_file():
        return None
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kept: list[ast.stmt] = [
        node
        for node in tree.body
        if _is_cheap(node) or (isinstance(node, ast.ClassDef) and node.name == "Settings")
    ]
    # Annotations are looked up in a module that is there; the types of settings are plain ones.
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile(ast.Module(body=kept, type_ignores=[]), str(file), "exec"), names)
    return names.get("Settings")


def _is_cheap(node: ast.stmt) -> bool:
    """Whether this is an import that a `Settings` may need."""
    if isinstance(node, ast.ImportFrom):
        return node.module in NEEDED or node.module in sys.stdlib_module_names
    return isinstance(node, ast.Import) and all(alias.name in sys.stdlib_module_names for alias in node.names)
