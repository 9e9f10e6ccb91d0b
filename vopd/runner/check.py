"""`vopd check RECIPE|FILE.yaml [key=value ...]`: all that a run checks before it starts, and nothing started.

Settings, recipe, machine, model, data (prepared if they are generated) and the length of every prompt. Exit code 0,
or 2 with the sentence that the run would end with. Example: vopd check RECIPE hardware.device=cuda
"""

from __future__ import annotations

from vopd.common.terminal import Terminal, say
from vopd.errors import UserError
from vopd.runner.run import Run


def main(arguments: list[str]) -> int:
    """Exit code 0, 2 for what would stop a run."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    console = Terminal()
    try:
        Run(arguments[0], arguments[1:], console).check()
    except UserError as error:
        say(f"vopd: {error}")
        return UserError.exit_code
    console.print(f"{arguments[0]}: settings, data, model and machine are as a run needs them")
    return 0
