"""Runs the cells of a notebook in order and writes what they show back into it.

    python -m benchmarks.notebook [docs/explore_results.ipynb]

Jupyter is no dependency of this repository. A notebook is a JSON file (nbformat 4), so the cells run as plain Python in
one namespace, with matplotlib's Agg backend, from the notebook's folder, as Jupyter would run them. A cell shows what
it printed and the value of its last expression: the text of any object, the HTML of a table, the PNG of a picture or
figure. No times and no versions are written, so that the same results give the same file.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

DEFAULT = Path(__file__).parents[1] / "docs" / "explore_results.ipynb"
Output = dict[str, Any]
"""One output of a cell as nbformat 4 has it."""


def read(path: Path) -> dict[str, Any]:
    """The notebook; ValueError for another format than nbformat 4."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    if notebook.get("nbformat") != 4:
        raise ValueError(f"{path} is no notebook of nbformat 4.")
    return dict(notebook)


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def execute(path: Path) -> list[list[Output]]:
    """The outputs of each code cell, run in order in one namespace; what a cell raises is raised, with its traceback
    naming `cell N`."""
    matplotlib.use("Agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with _inside(path.resolve().parent):
        return [
            _run("".join(cell["source"]), number, namespace)
            for number, cell in enumerate(code_cells(read(path)), start=1)
        ]


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before, search = Path.cwd(), list(sys.path)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = search


def _run(source: str, number: int, namespace: dict[str, Any]) -> list[Output]:
    tree = ast.parse(source, f"cell {number}")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {number}", "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), namespace)
    outputs: list[Output] = []
    if printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": _lines(printed.getvalue())})
    if value is not None:
        outputs.append(
            {"data": shown(value), "execution_count": number, "metadata": {}, "output_type": "execute_result"}
        )
    return outputs


def shown(value: Any) -> dict[str, Any]:
    """MIME type -> content of what a notebook shows of a value."""
    data: dict[str, Any] = {"text/plain": _lines(repr(value))}
    if isinstance(value, Figure):
        picture = io.BytesIO()
        value.savefig(picture, format="png", dpi=80, bbox_inches="tight", metadata={"Software": None})
        data["image/png"] = base64.b64encode(picture.getvalue()).decode()
    elif hasattr(value, "_repr_html_"):
        data["text/html"] = _lines(value._repr_html_())
    return data


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main(arguments: list[str]) -> int:
    """Exit code 0; a notebook whose cells fail is left as it was."""
    path = Path(arguments[0]) if arguments else DEFAULT
    notebook, outputs = read(path), execute(path)
    for number, (cell, own) in enumerate(zip(code_cells(notebook), outputs, strict=True), start=1):
        cell |= {"execution_count": number, "outputs": own}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{path}: {len(outputs)} cells, {path.stat().st_size / 1024:.0f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
