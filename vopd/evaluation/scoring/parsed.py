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


def parsed(value: str, reason: str) -> Parsed:
    """A decided answer."""
    return Parsed(value, "parsed", reason)


def unparsed(reason: str) -> Parsed:
    """No answer, with the reason."""
    return Parsed(None, "unparsed", reason)
