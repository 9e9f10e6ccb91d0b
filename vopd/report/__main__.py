"""`vopd report RUNS... [out=FOLDER] [mixed=true] [keep=FOLDER]`: several runs in one comparison.

RUNS are run folders, or folders that contain them, grouped by recipe over seeds. Writes table.md, report.html (one
file, opens from disk) and report.json to FOLDER (default: runs/report) and prints the main table.

  mixed=true   put runs together that are not comparable (other data, base model, budget, judge, parser or questions);
               the table then names the differences. Without it the first difference is an error.
  keep=FOLDER  also write each run's small record there (summary, packed answers and metrics), which can be given as
               RUNS later.

Unfinished and broken runs are named and left out.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vopd.common import ownership
from vopd.common.caches import results_folder
from vopd.common.command import reports_errors
from vopd.common.markdown import escaped
from vopd.common.terminal import Terminal, say, visible
from vopd.config import ROOT
from vopd.errors import UserError
from vopd.report import comparison, curves, gallery, page, published, tables
from vopd.report.archive import keep
from vopd.report.comparison import Comparison
from vopd.report.run_summary import as_json
from vopd.report.text_table import to_markdown, to_terminal

MAKER = "vopd.report"
NAMES = {
    "table.md": b"# Comparison\n",
    "report.html": b"<title>Comparison of ",
    "report.json": b'"verdict": ',
}
"""Files that are written, each with its first bytes."""


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    runs: list[Path]
    out: Path
    mixed: bool
    keep: Path | None


def parse_arguments(arguments: Sequence[str]) -> Arguments:
    """Read the command line; UserError for an argument that is neither a folder nor a known key."""
    options = {
        "out": str(ROOT / os.environ.get("VOPD_RUNS", "runs") / "report"),
        "mixed": "false",
        "keep": "",
    }
    runs = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in options:
            options[key] = value
        elif equals and not Path(argument).exists():
            raise UserError(
                f"'{argument}' is not understood; known are {', '.join(f'{k}=' for k in options)}."
            )
        else:
            runs.append(Path(argument))
    if options["mixed"] not in ("true", "false"):
        raise UserError(f"mixed={options['mixed']} is not understood; it is true or false.")
    if not runs:
        raise UserError("No runs were named; give run folders, or a folder that contains them.")
    kept = Path(options["keep"]) if options["keep"] else None
    return Arguments(runs, Path(options["out"]), options["mixed"] == "true", kept)


def write(c: Comparison, out: Path) -> None:
    """table.md, report.html and report.json; `UserError` where files of these names are the user's, or were edited."""
    results_folder(out, "out=...")
    owned = ownership.claim(out, MAKER, tuple(NAMES), recognise=_made_before)
    sheets = tables.sheets(c)
    text = f"# Comparison\n\n{escaped(tables.verdict(c))}\n\n" + "\n".join(
        to_markdown(sheet) for sheet in sheets
    )
    made = page.html(c, sheets, curves.pictures(c), gallery.make(c.groups))
    content = json.dumps(_numbers(c), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    for name, written in (("table.md", text), ("report.html", made), ("report.json", content)):
        owned.write_text(name, written)


def _made_before(file: Path) -> bool:
    """Whether an earlier version of this command wrote the file."""
    with file.open("rb") as stream:
        return NAMES[file.name] in stream.read(4096)


def _numbers(c: Comparison) -> dict[str, Any]:
    """Every figure of ours, unrounded; the paper's under a key of their own."""
    ours = {
        "verdict": tables.verdict(c),
        "tables": c.tables,
        "equal_tokens": c.tokens,
        "runs": [
            {
                "folder": str(run.folder),
                "kind": run.kind,
                "cost": run.cost,
                "collapse": run.collapse,
                **run.facts,
            }
            for run in c.runs
        ],
        "left_out": c.broken,
        "not_comparable": c.mixed,
        "published_by_the_paper": published.read(),
    }
    found = as_json(ours)
    assert isinstance(found, dict)
    return found


@reports_errors()
def main(arguments: Sequence[str]) -> int:
    """Exit code 0, 2 for bad input."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    console = Terminal()
    given = parse_arguments(arguments)
    ownership.check(given.out, MAKER, tuple(NAMES), recognise=_made_before)
    c = comparison.make(given.runs, given.mixed)
    kept = keep(c.runs, given.keep) if given.keep else []
    write(c, given.out)
    width = console.width if console.is_terminal else 180
    print(to_terminal(tables.sheets(c)[0], width), visible(tables.verdict(c)), sep="\n\n", end="\n\n")
    for folder in kept:
        say(f"kept: {folder}", file=sys.stdout)
    shown = given.out / "report.html"
    say(f"all tables, curves and answers: {shown} (also table.md, report.json)", file=sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
