"""Yes/no questions (POPE and the like): only a committed "yes" or "no" counts.

Rule order: FINAL (box, "final answer"), MARKED ("Answer: yes", "the answer is no"), LAST (last line is only
yes/no), SENTENCE (a sentence that opens with or consists of yes/no). The strongest present decides; two
different words within it, or another one stated later, leave the response unparsed. "No" as a determiner
("no dog", "no idea") is no answer.
"""

from __future__ import annotations

import re

from vopd.evaluation.scoring.clean import BOX_CLOSE, BOX_OPEN
from vopd.evaluation.scoring.conditions import conditional
from vopd.evaluation.scoring.parsed import Parsed, parsed, unparsed

_SAYS = {
    **dict.fromkeys(("yes", "yep", "yeah", "ja", "oui", "sí", "sì", "sim"), "yes"),
    **dict.fromkeys(("no", "nope", "nein", "non", "não"), "no"),
}
_WORD = "(?i:(" + "|".join(_SAYS) + r")(?![^\W_]|['/]))"
_CHINESE = {
    **dict.fromkeys(("是", "是的", "有", "有的", "对", "对的", "예", "네", "はい"), "yes"),
    **dict.fromkeys(("否", "不是", "没有", "不", "不对", "아니요", "아니오", "いいえ"), "no"),
}
_ENDS = (
    r"(?= ?(?:[.,;:!)}\n。、"
    + BOX_CLOSE
    + r"]| ?[–—]| -|$| ?\(|(?i: (?:because|since|as|there|it|this|that|the|i|they|he|she"
    r"|we|these|those|a|an)(?![a-z]))))"
)
_FILL = (
    r"(?i:(?:definitely|clearly|simply|probably|most likely|likely|therefore|a|is|it is|so"
    r"|that)[,:]? ){0,4}"
)
_FINAL = re.compile(
    BOX_OPEN
    + r" ?"
    + _WORD
    + r"(?:[. ]{0,2}"
    + BOX_CLOSE
    + r"|, )"
    + r"|(?i:final answer)(?: is)? ?[:\-]?\s?"
    + _FILL
    + _WORD
    + _ENDS
)
_MARKED = re.compile(
    r"(?<![A-Za-z])(?i:(?:answer|response|conclusion|ans)(?: here)?(?: ?[:=]| is:?|\n| -)|(?:答案|答)(?:是|为"
    r"|:)) ?\(?" + _FILL + _WORD + _ENDS
)
_LAST = re.compile(
    r"(?:^|\n|, |[–—] ?|(?<![A-Za-z])(?i:unfortunately|sadly|yes|no|simply|definitely) )\(?"
    + _WORD
    + r"\)?[.!。]?$"
)
_SENTENCE = re.compile(
    r"(?:^|\n|[.!?:;。]\s|(?<![A-Za-z])(?i:so|therefore|thus|hence|and|but|but actually|actually|wait|or"
    r"|it's"
    r"|it is|i'd say|i would say|i think|i believe),? (?:a )?)\(?" + _WORD + _ENDS
)
_ECHO = re.compile(r" ?\(yes ?(?:/|or) ?no\)", re.I)  # the question's "(yes or no)" repeated
_NOT_AN_ANSWER = re.compile(
    r"(?<![a-z])(?:yes ?(?:/|or|and) ?no|no ?(?:/|or|and) ?yes)(?![a-z])"
    r"|^no,? i (?:cannot|can't|am unable to|won't|am not able to) "
    r"(?:answer|help|assist|determine|tell|comply|say|provide)",
    re.I,
)


def _claims(pattern: re.Pattern[str], text: str, why: str) -> list[tuple[int, str, str]]:
    """Place, reason and word of every match that hangs on no condition."""
    return [
        (m.end(), why, _SAYS[m[m.lastindex or 1].lower()])
        for m in pattern.finditer(text)
        if not conditional(text, m.start(m.lastindex or 1), m.end(m.lastindex or 1))
    ]


def parse_yes_no(text: str) -> Parsed:
    """ "yes" or "no" of a cleaned response."""
    text = _ECHO.sub("", text)
    bare = text.strip(" .!。,\n" + BOX_OPEN + BOX_CLOSE)
    if bare in _CHINESE:
        return parsed(_CHINESE[bare], "whole response")
    chinese = re.match(r"(是的|不是|没有|有的|对的|不对|是|否|有|对|不)[,。.!\n]", text) or re.search(
        r"(?:Answer: |the answer is |(?:答案|所以|因此)(?:是|为)?:? ?)"
        r"(是|否|有|没有|예|네|아니요|아니오|はい|いいえ)(?:입니다|です)?[。.]?$",
        text,
    )
    if chinese:
        return parsed(_CHINESE[chinese[1]], "Chinese yes/no")
    final_claims = _claims(_FINAL, text, "final answer")
    marked = _claims(_MARKED, text, "marked answer")
    if not final_claims and not marked and _NOT_AN_ANSWER.search(text):
        return unparsed("both words, or a refusal")
    last = _claims(_LAST, text, "last line")
    sentence = _claims(_SENTENCE, text, "opening word of a sentence")
    for claims in (final_claims, marked, last, sentence):
        if not claims:
            continue
        end, reason, word = claims[-1]
        later = [c for c in (*final_claims, *marked, *last, *sentence) if c[0] > end]
        said = {c[2] for c in claims} | {c[2] for c in later}
        if claims is last:  # a one-word opening line is as explicit as a one-word last line
            said |= {c[2] for c in sentence if c[0] <= 8}
        return parsed(word, reason) if len(said) == 1 else unparsed("both yes and no are stated")
    return unparsed("neither yes nor no is stated")
