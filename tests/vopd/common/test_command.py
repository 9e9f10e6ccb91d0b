"""What a person sees of an error, and the exit code."""

import errno
import os

import pytest

from vopd.common.command import INTERRUPTED, reports_errors
from vopd.errors import UserError

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
READ_ONLY = OSError(errno.EROFS, os.strerror(errno.EROFS), "out/records.jsonl")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("seed=x: not a number.\nGive one."), 2, "the.tool: seed=x: not a number. Give one."),
        (FULL, 2, "the.tool: No space left on device; what is done is kept."),
        (READ_ONLY, 2, "the.tool: out/records.jsonl: Read-only file system; what is done is kept."),
        (OSError("two\nlines \x1b[2J"), 2, "the.tool: two lines \u241b[2J; what is done is kept."),
        (KeyboardInterrupt(), INTERRUPTED, "the.tool: interrupted; the same command resumes."),
    ],
)
def test_errors_become_a_sentence_and_a_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    @reports_errors("the.tool", interrupted="the same command resumes", kept="what is done is kept")
    def main(words: list[str]) -> int:
        raise error

    assert main([]) == code
    assert capsys.readouterr().err == f"{said}\n"


@pytest.mark.parametrize(
    ("error", "said"), [(FULL, "No space left on device"), (KeyboardInterrupt(), "interrupted")]
)
def test_a_command_with_nothing_more_to_say(
    capsys: pytest.CaptureFixture[str], error: BaseException, said: str
) -> None:
    @reports_errors()
    def main() -> int:
        raise error

    assert main() in (2, INTERRUPTED)
    assert capsys.readouterr().err == f"vopd: {said}.\n"


def test_the_code_of_a_command_passes_and_a_mistake_of_ours_keeps_its_traceback() -> None:
    @reports_errors()
    def main(code: int) -> int:
        """The help."""
        if code < 0:
            raise ValueError("ours")
        return code

    assert (main(0), main(1), main.__doc__) == (0, 1, "The help.")
    with pytest.raises(ValueError, match="ours"):
        main(-1)
