"""The edge between a command and its terminal: errors that a person can do something about become one sentence."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from vopd.common.failures import one_line
from vopd.common.terminal import say
from vopd.errors import UserError

INTERRUPTED = 130
Arguments = ParamSpec("Arguments")
Main = Callable[Arguments, int]


def reports_errors(
    name: str = "vopd", interrupted: str = "", kept: str = ""
) -> Callable[[Main[Arguments]], Main[Arguments]]:
    """Decorates a command's `main`, which returns its exit code.

    Bad input (`UserError`) and what the system refuses (`OSError`: a full disk, a folder that cannot be read) end in a
    sentence on standard error and exit code 2, Ctrl-C in exit code 130. Any other exception is a mistake of ours and
    keeps its traceback.

    Args:
        name: what the sentence begins with.
        interrupted: what a person should know after Ctrl-C, such as what the same command does when it is given again.
        kept: what is left of the work after an `OSError`.
    """

    def decorated(main: Main[Arguments]) -> Main[Arguments]:
        @wraps(main)
        def command(*args: Arguments.args, **options: Arguments.kwargs) -> int:
            try:
                return main(*args, **options)
            except UserError as error:
                say(f"{name}: {error}")
                return error.exit_code
            except OSError as error:
                where = f"{error.filename}: " if error.filename else ""
                say(f"{name}: {where}{error.strerror or one_line(str(error))}{f'; {kept}' if kept else ''}.")
                return UserError.exit_code
            except KeyboardInterrupt:
                say(f"{name}: interrupted{f'; {interrupted}' if interrupted else ''}.")
                return INTERRUPTED

        return command

    return decorated
