"""What a parser returns: an answer, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Parsed:
    """The outcome of parsing one response.

    value: the canonical answer ("B", "yes", "1200", a text), None when unparsed.
    state: "parsed" or "unparsed"; an unparsed response is never scored correct.
    reason: which rule decided, or why none could.
    """

    value: str | None
    state: Literal["parsed", "unparsed"]
    reason: str

    @property
    def conflict(self) -> bool:
        """Whether two answers are stated, which words that take the first one back would settle."""
        return self.value is None and self.reason.startswith(("two ", "both ", "no single number"))

    @property
    def committed(self) -> bool:
        """Whether words announce the answer; the only letter or number of a text is read without any."""
        return self.value is not None and not self.reason.startswith(
            ("only ", "the only ", "last line", "labelled")
        )


def parsed(value: str, reason: str) -> Parsed:
    """A decided answer."""
    return Parsed(value, "parsed", reason)


def unparsed(reason: str) -> Parsed:
    """No answer, with the reason."""
    return Parsed(None, "unparsed", reason)
