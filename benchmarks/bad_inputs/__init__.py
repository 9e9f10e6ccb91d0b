"""Bad inputs of every kind, each with the message the user should see: `python -m benchmarks.bad_inputs`.

A case is a command line (and what it finds on disk) that cannot work. The same cases are a test
(`tests/test_bad_inputs.py`, in one process) and a table (here, a process each: exit code, seconds, sentence). Cases
stand in `cases_<area>.py`, one file an area, as a tuple called CASES.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One bad input.

    Args:
        kind: a few words for the table, unique among all cases.
        module: what is run as `python -m MODULE`; it has `main(arguments) -> int`.
        arguments: the command line, given an empty folder in which to put what the command is to find.
        says: a part of the one sentence on standard error; names the file, row or key.
        code: the exit code.
        environment: variables of the process; a callable is given the case's folder.
    """

    kind: str
    module: str
    arguments: Callable[[Path], list[str]]
    says: str
    code: int = 2
    environment: Mapping[str, str | Callable[[Path], str]] = field(default_factory=dict)

    def variables(self, folder: Path) -> dict[str, str]:
        """The environment's variables for a case that lives in `folder`."""
        return {
            name: value if isinstance(value, str) else value(folder)
            for name, value in self.environment.items()
        }


def cases() -> list[Case]:
    """All cases, in the order of their files."""
    files = sorted(Path(__file__).parent.glob("cases_*.py"))
    modules = [importlib.import_module(f"{__name__}.{file.stem}") for file in files]
    return [case for module in modules for case in module.CASES]
