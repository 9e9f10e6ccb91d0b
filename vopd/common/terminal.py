"""What is printed to a terminal: text from outside is shown there and does nothing.

Names, questions, answers, a server's words and file names can hold sequences that move the cursor, rename the window,
write to the clipboard, make a link or turn the direction of writing. `visible` shows such signs instead; everything of
ours that prints goes through it, by `say` or through a `Terminal`.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from vopd.common.redaction import redacted

KEPT = "\n\t\u200c\u200d"  # joiners belong to the spelling of words and to emoji
CONTROL_PICTURES = 0x2400
DELETE = 0x7F
HIDDEN = {
    "Cc",
    "Cf",
    "Cs",
    "Zl",
    "Zp",
}  # control, format (directions, tags), lone surrogates, odd ends of line


def visible(text: object) -> str:
    """The text with a visible sign for each character that a terminal would act upon; ends of line stay."""
    return "".join(map(_sign, str(text)))


def _sign(character: str) -> str:
    number = ord(character)
    if 0x20 <= number < DELETE or character in KEPT:
        return character
    if number < 0x20:
        return chr(CONTROL_PICTURES + number)
    if number == DELETE:
        return "\u2421"
    return "\ufffd" if unicodedata.category(character) in HIDDEN else character


def say(*sentences: object, file: IO[str] | None = None) -> None:
    """Print each sentence on a line of its own, whatever it holds; to standard error unless told otherwise."""
    for sentence in sentences:
        print(visible(redacted(" ".join(str(sentence).splitlines()))), file=file or sys.stderr)


class Terminal(Console):
    """rich's console on which text is text: no markup, no emoji names, no control sequences but rich's own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "markup": False, "emoji": False} | options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Text is measured as it will be shown."""
        return super().render_str(visible(text), **options)

    def render(self, *args: Any, **options: Any) -> Iterable[Segment]:
        """Segments of text pass `visible`; those that steer the terminal come from rich."""
        for segment in super().render(*args, **options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)
