"""The rules of the published evaluation, defects included: only to set our numbers beside published ones.

Facts of the rules, restated: text from an <answer> tag, else from the first "Answer:" on *with that word*,
else all of it. Letters: the first bracketed capital, else the first capital before a point, bracket or space,
else the first capital anywhere -- so "Answer: D" reads as A. Options (a)/(b), as in MMVP: the first bracketed or
stand-alone a or b -- the article included. Yes/no: the opening word, else the last one; a lower-case "answer"
marker is found but split on case-sensitively, which makes the published code fail on "Answer: yes".
Beside these, a text that is the gold text as a whole is right, by the rules of a library for mathematical answers:
case, spaces, units, `$`, `%` and commas of thousands aside. For ZoomBench, which is not among the letter benchmarks,
that is the only rule. Not reproduced is what that library does with the rest: it has sympy evaluate both texts as
programs, which a model's text must not be. What no rule finds right goes to a judge (`vopd/evaluation/judge.py`).
Never used for rewards or for our own tables.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from vopd.errors import UserError
from vopd.evaluation.scoring import is_correct
from vopd.evaluation.scoring.numbers import canonical
from vopd.evaluation.scoring.parsed import Parsed, parsed, unparsed

TEXTS = ("number", "short", "free")
"""Answer types that are read as a whole text."""
_CAPITALS = (
    ("first bracketed capital", re.compile(r"\(([A-Z])\)")),
    ("first capital before a point, bracket or space", re.compile(r"([A-Z])[.)\s]")),
    ("first capital anywhere", re.compile(r"([A-Z])")),
)
_LOWER_PAIR = re.compile(r"\(([ab])\)|\b([ab])\b")
_UNITS = re.compile(
    r"(?:degree|cm|centimeter|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard)(?:es)?s?"
)
_TEXT = re.compile(r"\\text\{(.+?)\}")
_NUMBER = re.compile(r"-?(?:\d{1,30}\.?\d{0,30}|\.\d{1,30})", re.ASCII)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def extracted(text: str) -> str:
    """The part of a response that is taken for its answer."""
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
    answer = extracted(text)
    if answer_type == "letter":
        return _lower_pair(answer) if lowercase_options else _letter(answer)
    if answer_type == "yes/no":
        return _yes_no(answer)
    if answer_type in TEXTS:
        return parsed(answer, "whole text") if answer else unparsed("empty")
    raise UserError(f"Answer type '{answer_type}' is unknown.")


def is_right(result: Parsed, text: str, gold: str, answer_type: str) -> bool:
    """Whether the rules find a response right; `result` is what `parse_official` made of its text."""
    by_rule = answer_type not in TEXTS and is_correct(result, gold, answer_type)
    return by_rule or _plain(extracted(text)) == _plain(gold)


def _plain(text: str) -> str:
    whole = _TEXT.fullmatch(text)
    text = re.sub(r"\\?[$%]", "", whole[1] if whole else text)
    text = _THOUSANDS.sub("", re.sub(r"[\s{}]", "", _UNITS.sub("", text.lower())))
    number = _NUMBER.fullmatch(text)
    return canonical(Decimal(text)) if number else text
