"""A mistake in a recipe's own module, as one sentence with its file and line.

The module is third-party code: whatever it raises while it is imported, or while it makes the method, is its
author's to fix, and a traceback through this package does not tell them where.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vopd.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
MOST = 300  # characters of a message


def place(error: BaseException, own: Path | None = None) -> str | None:
    """`FILE, line N` of where an exception comes from.

    Args:
        error: a SyntaxError names its place itself; of others it is the innermost line of `own`, or, where none of its
            lines is in the traceback, the innermost line outside the standard library's import machinery and this
            package.
        own: the file whose author is to be told.
    """
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{error.filename}, line {error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    inside = [f for f in frames if own is not None and Path(f.filename) == own]
    others = [f for f in frames if not Path(f.filename).is_relative_to(PACKAGE)]
    chosen = (inside or others)[-1:]
    return f"{chosen[0].filename}, line {chosen[0].lineno}" if chosen else None


def sentence(error: BaseException, own: Path | None = None) -> str:
    """`FILE, line N: TypeError: what it says` on one line."""
    said = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())[:MOST]
    what = f"{type(error).__name__}: {said}" if said else type(error).__name__
    where = place(error, own)
    return f"{where}: {what}" if where else what


@contextmanager
def told(doing: str, own: Path | None = None) -> Iterator[None]:
    """Run third-party code: what it raises becomes a UserError; one that it raises itself passes.

    Args:
        doing: what was being done, for the sentence, such as `importing the recipe's module`.
        own: the file of that code.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the boundary to code that is not ours
        raise UserError(f"{sentence(error, own)} (while {doing}).") from error
