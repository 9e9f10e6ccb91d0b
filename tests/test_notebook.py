"""docs/explore_results.ipynb: its cells run and give the outputs that it holds; the tool that runs them."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import notebook
from vopd.config import ROOT

NOTEBOOK = ROOT / "docs" / "explore_results.ipynb"


def texts(outputs: list[dict[str, Any]]) -> list[Any]:
    """What is printed, and the text and HTML of what is shown."""
    return [
        output.get("text")
        or {kind: text for kind, text in output["data"].items() if kind.startswith("text/")}
        for output in outputs
    ]


def kinds(outputs: list[dict[str, Any]]) -> list[list[str]]:
    return [sorted(output.get("data", ())) for output in outputs]


def test_the_notebook_shows_what_its_cells_give() -> None:
    """Pictures are compared by their being there: their bytes depend on the versions of two libraries."""
    held = [cell["outputs"] for cell in notebook.code_cells(notebook.read(NOTEBOOK))]
    given = notebook.execute(NOTEBOOK)
    for own, new in zip(held, given, strict=True):
        assert texts(own) == texts(new), "run `python -m benchmarks.notebook` and look at what changed"
        assert kinds(own) == kinds(new)


def test_the_notebook_is_whole_and_small() -> None:
    """As nbformat 4.5 has it: an id for every cell, counted and finished cells, pictures that open."""
    assert NOTEBOOK.stat().st_size < 2**20
    content = notebook.read(NOTEBOOK)
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids) > 15
    cells = notebook.code_cells(content)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    pictures = [
        o["data"]["image/png"] for c in cells for o in c["outputs"] if "image/png" in o.get("data", {})
    ]
    assert len(pictures) >= 2
    for picture in pictures:
        Image.open(io.BytesIO(base64.b64decode(picture))).load()


def written(path: Path, *sources: str) -> Path:
    """A notebook of code cells."""
    cells = [{"cell_type": "code", "source": source.splitlines(keepends=True)} for source in sources]
    path.write_text(json.dumps({"nbformat": 4, "cells": cells}))
    return path


def test_a_cell_shows_its_print_and_its_last_expression(tmp_path: Path) -> None:
    path = written(tmp_path / "x.ipynb", "a = 2\nprint('two')\na + 1", "a += 1", "a", "print(__name__)")
    assert notebook.main([str(path)]) == 0
    cells = notebook.code_cells(notebook.read(path))
    shown = [texts(cell["outputs"]) for cell in cells]
    assert shown == [[["two\n"], {"text/plain": ["3"]}], [], [{"text/plain": ["3"]}], [["__main__\n"]]]


def test_tables_and_figures_are_shown_as_such(tmp_path: Path) -> None:
    table = "import pandas as pd\npd.DataFrame({'x': [1]})"
    figure = "import matplotlib.pyplot as plt\nfigure, axis = plt.subplots()\nplt.close(figure)\nfigure"
    shown = notebook.execute(written(tmp_path / "x.ipynb", table, figure))
    assert [kinds(outputs) for outputs in shown] == [
        [["text/html", "text/plain"]],
        [["image/png", "text/plain"]],
    ]


def test_a_notebook_whose_cell_fails_stays_as_it_was(tmp_path: Path) -> None:
    path = written(tmp_path / "x.ipynb", "1", "1 / 0")
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        notebook.main([str(path)])
    assert path.read_bytes() == before


def test_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.ipynb").write_text('{"nbformat": 3, "worksheets": []}')
    with pytest.raises(ValueError, match="nbformat 4"):
        notebook.read(tmp_path / "x.ipynb")
