"""`vopd check RECIPE|FILE.yaml [key=value ...]`: what a run would take and whether it could start, and nothing started.

Prints what would run, an estimate of memory, disk and seconds with the formula of each figure, and what was looked at:
settings, recipe, machine, model, data (prepared if they are generated) and the length of every prompt. Exit code 0, or
2 with the sentence that the run would end with. The same: `vopd run RECIPE ... check=true`. The estimate needs the
model's config.json alone (model.path=FOLDER). Example: vopd check RECIPE hardware.device=cuda
"""

from __future__ import annotations

from vopd.common.command import reports_errors
from vopd.common.terminal import Terminal
from vopd.runner.run import Run


@reports_errors()
def main(arguments: list[str]) -> int:
    """Exit code 0, 2 for what would stop a run."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    console = Terminal()
    Run(arguments[0], arguments[1:], console).only_check()
    return 0
