"""Short and free text answers.

Short: a box, "final answer ...", "Answer: ...", "the answer is ...", else the last line, without its
introduction ("It is"). Different texts stated at the deciding rank are unparsed. Free: the whole response
without its reasoning block; right only if it equals the gold text, so free answers want a judge.
"""

from __future__ import annotations

import re

from vopd.evaluation.scoring.announced import REJECTION
from vopd.evaluation.scoring.clean import BOX_CLOSE, BOX_OPEN, comparable, is_refusal, strip_lead_in
from vopd.evaluation.scoring.parsed import Parsed, parsed, unparsed

_REST = r"([^\n" + BOX_CLOSE + r"]{1,2000})"
_MARKS = [
    ("boxed", re.compile(BOX_OPEN + "([^" + BOX_OPEN + BOX_CLOSE + "]{1,2000})" + BOX_CLOSE)),
    (
        "final answer",
        re.compile(r"(?<![A-Za-z])(?i:final answer|最终答案)(?: is|是|为)? ?[:=\-]?\s?" + _REST),
    ),
    ("marked answer", re.compile(r"(?<![A-Za-z])(?i:answer|ans|答案|答)(?: is|是|为)? ?[:=]\s?" + _REST)),
    ("the answer is", re.compile(r"(?<![A-Za-z])(?i:answer is |答案[是为] ?)" + _REST)),
]


def parse_short(text: str) -> Parsed:
    """The short text a cleaned response commits itself to."""
    for reason, pattern in _MARKS:
        contents = [strip_lead_in(m[1]) for m in pattern.finditer(text)]
        contents = [c for c in contents if c]
        if contents:
            if len({comparable(c) for c in contents}) > 1:
                return unparsed("two different answers")
            return _stated(contents[-1], reason)
    value = strip_lead_in(text[text.rfind("\n") + 1 :])
    if not value:
        return unparsed("no words")
    return _stated(value, "last line")


def _stated(value: str, reason: str) -> Parsed:
    if REJECTION in value:
        return unparsed("an answer is rejected, none is given")
    return unparsed("a refusal") if is_refusal(value) else parsed(value, reason)


def parse_free(text: str) -> Parsed:
    """The whole cleaned response."""
    return unparsed("a refusal") if is_refusal(text) and len(text) < 300 else parsed(text, "whole response")
