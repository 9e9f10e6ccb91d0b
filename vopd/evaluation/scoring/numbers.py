"""Numeric answers: one number, whatever its clothes (commas, words, units, decimals).

Rule order: box, "final answer", a marked answer ("Answer: ...", "the answer is ..."), a conclusion ("so 5",
"total: 5"), the first or last line if it is only a number, the whole response. In the place that decides
there must be exactly one distinct number: "3 or 4" and "3-5" are unparsed. Number words count only where there
are no digits. A percent sign and units are dropped. Values are canonical decimals: "1,200.0" -> "1200".
"""

from __future__ import annotations

import re
from decimal import Decimal

from vopd.evaluation.scoring.clean import BOX_CLOSE, BOX_OPEN, is_refusal
from vopd.evaluation.scoring.conditions import conditional
from vopd.evaluation.scoring.parsed import Parsed, parsed, unparsed

_WORDS = {
    **{
        "zero": 0,
        "one": 1,
        "two": 2,
        "three": 3,
        "four": 4,
        "five": 5,
        "six": 6,
        "seven": 7,
        "eight": 8,
        "nine": 9,
    },
    **{"ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16},
    **{"seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50},
    **{"sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90},
}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000}
_CHINESE = {c: i for i, c in enumerate("零一二三四五六七八九十")} | {"两": 2, "〇": 0}

_ORDINAL = re.compile(r"(?:st|nd|rd|th)(?![a-z])", re.I)
_FRACTION = re.compile(
    r"(?<![\d/.])(-?\d{1,9}) ?/ ?([1-9]\d{0,8})(?![\d/])|\\d?frac ?\{(-?\d{1,9})\}\{([1-9]\d{0,8})\}"
)
_WORD_RUN = re.compile(
    r"(?<![a-z])((?:minus |negative )?(?:"
    + "|".join([*_WORDS, *_SCALES])
    + r")(?:[ -](?:and )?(?:"
    + "|".join([*_WORDS, *_SCALES])
    + r")){0,12})(?![a-z])"
)
_ONE_PRONOUN = re.compile(
    r"(?:no|the|this|that|which|another|each|every|only|any|some|first|last|correct|right"
    r"|left|\d{1,3}(?:st|nd|rd|th)) one(?![a-z])|the [a-z]{1,20} one(?![a-z])|(?<![a-z])one (?:of"
    r"|by)(?![a-z])"
    r"|(?<![a-z])one (?:can|could|might|must|should)(?![a-z])"
)
_VAGUE = re.compile(
    r"(?<![a-z])(?:half|a third|a quarter|dozens?|a couple|a few|more than|less than|fewer than"
    r"|at least|at most|up to)(?![a-z])"
)
# "Not 4" names no number; "not only 4" does.
_DENIED = re.compile(
    r"(?:\u2298not|(?<![a-z])(?:not|never)|n't) (?:(?:be|exactly|quite|the|see|have|show|count|find"
    r"|contain|get) ){0,2}(?:-?\d+(?:[.,]\d+)*|" + _WORD_RUN.pattern + ")",
    re.I,
)
_FIRST = re.compile(r"\d+(?:[.,]\d+)*|" + _WORD_RUN.pattern, re.I)
_CHINESE_RUN = re.compile("[" + "".join(_CHINESE) + "]{1,3}")
# "12. The picture shows 3 rows", "5, as 3 are red": what follows explains.
_CLAUSE_BREAK = re.compile(r"[.;!?。](?: |$)|,? (?:because|since|as|which)(?![a-z])|, (?=[a-z])| \(")
_BARE_NUMBER = re.compile(r"[^\w]{0,3}[\w,.+-]{1,60}(?: [^\W\d]{1,20})?[.!]?")
_MARKS = [
    ("boxed", re.compile(BOX_OPEN + "([^" + BOX_OPEN + BOX_CLOSE + "]{0,300})" + BOX_CLOSE)),
    (
        "final answer",
        re.compile(r"(?i:final answer|最终答案)(?: is|是|为)? ?[:=\-]?\s?([^\n" + BOX_CLOSE + r"]{1,300})"),
    ),
    (
        "marked answer",
        re.compile(
            r"(?<![A-Za-z])(?i:(?:answer|ans)(?: ?[:=]| is:?|\n)|(?:答案|答)(?:是|为|有|:))\s?([^\n"
            + BOX_CLOSE
            + r"]{1,300})"
        ),
    ),
    (
        "conclusion",
        re.compile(
            r"(?:(?<![A-Za-z])(?i:(?:total|count|result|number|sum)(?: count| number)?(?: ?[:=]| is:?)"
            r"|(?:so|therefore|thus|hence|in total|which gives|which makes|for a total of)"
            r"(?![a-z]),?)|总共|一共|共有)\s?(?=([^\n" + BOX_CLOSE + r"]{1,300}))"
        ),
    ),
    (
        "a closing sum",
        re.compile(r"(?<![A-Za-z])(?i:total|altogether|in all)(?: of)? (\d{1,9})[^\w\n]{0,3}$"),
    ),
]


def canonical(number: Decimal) -> str:
    """Plain decimal notation without trailing zeros."""
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text


def _from_words(run: str) -> Decimal | None:
    words = re.split(r"[ -]", run)
    sign = -1 if words[0] in ("minus", "negative") else 1
    total, group, previous = 0, 0, 1_000_000_000
    for word in words:
        if word in ("minus", "negative", "and"):
            continue
        if word in _SCALES:
            scale = _SCALES[word]
            group = max(group, 1) * scale
            if scale >= 1000:
                total, group = total + group, 0
            previous = scale
            continue
        value = _WORDS[word]
        if (value and previous <= value) or previous < 20:  # "two three" is a list, not a number
            return None
        group += value
        previous = value if value else 1
    return Decimal(sign * (total + group))


def _from_chinese(run: str) -> Decimal | None:
    if len(run) == 1:
        return Decimal(_CHINESE[run])
    tens, ten, units = run.partition("十")
    if not ten or len(tens) > 1 or len(units) > 1 or "十" in units:
        return None
    return Decimal(10 * (_CHINESE[tens] if tens else 1) + (_CHINESE[units] if units else 0))


def numbers_in(text: str) -> list[Decimal | None]:
    """Every number of a text in order; None for number words that make no single number."""
    fractions = list(_FRACTION.finditer(text))
    if fractions:
        found: list[Decimal | None] = [Decimal(m[1] or m[3]) / Decimal(m[2] or m[4]) for m in fractions]
        return found + numbers_in(_FRACTION.sub(" ", text))
    digits: list[Decimal | None] = []
    for match in re.finditer(r"\d[\d,.]{0,80}(?:[eE][+-]?\d{1,2}(?!\d))?|\.\d{1,40}", text):
        digits += _from_digits(text, match)
    vague: list[Decimal | None] = [None for _ in _VAGUE.finditer(text.lower())]
    if digits:
        return digits + vague
    lowered = _ONE_PRONOUN.sub(" ", text.lower())
    words = [_from_words(m[1]) for m in _WORD_RUN.finditer(lowered)]
    return words + vague or [_from_chinese(m[0]) for m in _CHINESE_RUN.finditer(text)]


def _from_digits(text: str, match: re.Match[str]) -> list[Decimal | None]:
    """Numbers of one run of digits, commas and points; labels such as "A4" and ordinals are none."""
    start, run = match.start(), match[0].rstrip(",.")
    before, lead = text[max(0, start - 2) : start], text[max(0, start - 9) : start].lower()
    if re.search(r"[A-Za-z_]$", before) or _ORDINAL.match(text, start + len(run)):
        return []
    sign = -1 if re.search(r"(?:^|[^\w)%.])-$|^-$", before) or lead.endswith(("minus ", "negative ")) else 1
    if re.match(r" ?[x×] ?\d", text[start + len(run) :]):  # "1024x768"
        return [None]
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", run):
        return [sign * Decimal(run.replace(",", ""))]
    if re.fullmatch(r"\d*\.?\d+(?:[eE][+-]?\d+)?", run):
        return [sign * Decimal(run)]
    return [Decimal(part) for part in re.split(r"[,.]", run) if part.isdigit()]


def _single(text: str) -> str | None:
    found = set(numbers_in(text))
    only = found.pop() if len(found) == 1 else None
    return None if only is None else canonical(only)


def _leading(content: str) -> str | None:
    """The number of a marked content: its only one, else the only one of its first clause."""
    if _supposed(content):
        return None
    return _single(content) or _single(_CLAUSE_BREAK.split(content, maxsplit=1)[0])


def _supposed(text: str) -> bool:
    """Whether the first number hangs on a condition."""
    first = _FIRST.search(text)
    return first is not None and conditional(text, first.start(), first.end())


def _after(text: str, mark: re.Pattern[str], place: int) -> list[str | None]:
    """What a mark claims after a place in the text."""
    return [_leading(m[1]) for m in mark.finditer(text, place + 1)]


def parse_number(text: str) -> Parsed:
    """The one number of a cleaned response (see the module docstring for the rule order)."""
    text = _DENIED.sub(" ", text)
    for reason, mark in _MARKS:
        claims = [(m.start(), _leading(m[1])) for m in mark.finditer(text)]
        if reason in (
            "conclusion",
            "a closing sum",
        ):  # "the total is unclear: 3 here, 4 there" concludes nothing
            claims = [(place, value) for place, value in claims if value]
        if claims:
            later = {v for m in _MARKS[1:3] for v in _after(text, m[1], claims[-1][0])}
            values = {value for _, value in claims} | later
            only = values.pop() if len(values) == 1 else None
            return parsed(only, reason) if only else unparsed("no single number in the marked answer")
    lines = text.split("\n")
    ends = {line for line in (lines[0], lines[-1]) if len(lines) > 1 and _BARE_NUMBER.fullmatch(line)}
    stated = {value for value in map(_single, ends) if value}
    if stated:
        return (
            parsed(stated.pop(), "a line with only a number") if len(stated) == 1 else unparsed("two numbers")
        )
    if is_refusal(text):
        return unparsed("a refusal")
    if _supposed(text):
        return unparsed("a condition")
    value = _single(text) or _single(text.split(" (", 1)[0])  # "8 boats (3 white, 5 blue)"
    if value is None:
        return unparsed("several numbers" if numbers_in(text) else "no number is stated")
    return parsed(value, "only number")


def parse_gold_number(gold: str) -> str | None:
    """Canonical form of a gold number; None when the gold is not one number."""
    return _single(gold.strip())
