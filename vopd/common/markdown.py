"""Text from outside in a Markdown file: it stays text, on one line."""

from __future__ import annotations

from vopd.common.terminal import visible

# A backslash first, then what starts an entity, a cell, a tag, emphasis, code, and what makes a link of two brackets.
SIGNS = (
    ("\\", "\\\\"),
    ("&", "&amp;"),
    ("|", "\\|"),
    ("<", "&lt;"),
    ("*", "\\*"),
    ("`", "\\`"),
    ("](", "]\\("),
)


def escaped(text: object) -> str:
    """`text` for a cell, a heading, an item of a list or a sentence."""
    line = visible(" ".join(str(text).split()))
    for sign, written in SIGNS:
        line = line.replace(sign, written)
    return line


def fenced(text: str, language: str = "") -> str:
    """`text` as a block of code that nothing in it ends."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
