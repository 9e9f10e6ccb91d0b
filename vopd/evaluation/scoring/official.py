"""The rule of the published evaluation, its defects included: only to set our numbers beside published ones.

Facts of the rule, restated: text from an <answer> tag, else from the first "Answer:" on *with that word*,
else all of it. Letters: the first bracketed capital, else the first capital before a point, bracket or space,
else the first capital anywhere -- so "Answer: D" reads as A. Options (a)/(b), as in MMVP: the first bracketed or
stand-alone a or b -- the article included. Yes/no: the opening word, else the last one; a lower-case "answer"
marker is found but split on case-sensitively, which makes the published code fail on "Answer: yes".
What this rule does not settle the published evaluation sends to an exact-match library and then to an LLM
judge, whose outage counts as "No"; neither is reproduced here. Never used for rewards or for our own tables.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vopd.errors import UserError
from vopd.evaluation.scoring.numbers import parse_gold_number
from vopd.evaluation.scoring.parsed import Parsed, parsed, unparsed

_CAPITALS = (
    ("first bracketed capital", re.compile(r"\(([A-Z])\)")),
    ("first capital before a point, bracket or space", re.compile(r"([A-Z])[.)\s]")),
    ("first capital anywhere", re.compile(r"([A-Z])")),
)
_LOWER_PAIR = re.compile(r"\(([ab])\)|\b([ab])\b")


def _extract(text: str) -> str:
    opened, closed = text.find("<answer>"), text.find("</answer>")
    if opened >= 0 and closed >= 0:
        return text[opened + len("<answer>") : closed].strip()
    return text[max(text.find("Answer:"), 0) :].strip()


def _letter(text: str) -> Parsed:
    for reason, pattern in _CAPITALS:
        match = pattern.search(text)
        if match:
            return parsed(match[1], reason)
    return unparsed("no capital letter")


def _lower_pair(text: str) -> Parsed:
    lowered = text.lower()
    match = re.search(r"\(([ab])\)", lowered) or _LOWER_PAIR.search(lowered)
    if match is None:
        return unparsed("neither a nor b")
    return parsed((match[1] or match[match.lastindex or 1]).upper(), "first a or b")


def _yes_no(text: str) -> Parsed:
    text = text.lstrip("*").strip()
    if text.lower().startswith("answer"):
        pieces = text.split("answer", 1)
        if len(pieces) == 1:
            return unparsed("the published code fails here")
        text = pieces[1].lstrip(":").lstrip("*").strip()
    lowered = text.lower()
    for word in ("yes", "no"):
        if lowered.startswith(word):
            return parsed(word, "opening word")
    words = text.rstrip(".").rstrip("*").split()
    last = words[-1].strip("*").lower() if words else ""
    return parsed(last, "last word") if last in ("yes", "no") else unparsed("neither opening nor last word")


def parse_official(
    text: str, answer_type: str, options: Sequence[str] = (), *, lowercase_options: bool = False
) -> Parsed:
    """Parse by the published rule; same arguments and result as `parse_answer`.

    options is accepted and ignored, as in the published code. lowercase_options: the question's options are
    (a) and (b), as in MMVP. UserError for an unknown answer type.
    """
    extracted = _extract(text)
    if answer_type == "letter":
        return _lower_pair(extracted) if lowercase_options else _letter(extracted)
    if answer_type == "yes/no":
        return _yes_no(extracted)
    if answer_type in ("number", "short", "free"):
        value = extracted.removeprefix("Answer:").strip()
        value = (parse_gold_number(value) or value) if answer_type == "number" else value
        return parsed(value, "whole text") if value else unparsed("empty")
    raise UserError(f"Answer type '{answer_type}' is unknown.")
