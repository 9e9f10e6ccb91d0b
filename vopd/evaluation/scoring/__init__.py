"""The one answer parser: rewards, the SFT filter and evaluation all use it.

Strict by design: what a response does not commit itself to is "unparsed" and never scored correct, and a parsed
answer is final -- no second reading rescues an incorrect one. The order of the rules is at the top of each
answer type's module (`letters`, `yes_no`, `numbers`, `texts`); what they share is in `clean` (one plain form),
`announced` (one language, rejections marked) and `conditions` (ifs, and answers taken back). Before any
rule: a response that is empty, that is a failed call's message, or whose reasoning block was never closed is
unparsed; text before a closed reasoning block's end is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vopd.errors import UserError
from vopd.evaluation.scoring.announced import announced
from vopd.evaluation.scoring.clean import clean, comparable, cut_reasoning, is_error
from vopd.evaluation.scoring.conditions import after_last_withdrawal
from vopd.evaluation.scoring.letters import option_labels, parse_letter
from vopd.evaluation.scoring.numbers import parse_gold_number, parse_number
from vopd.evaluation.scoring.parsed import Parsed, unparsed
from vopd.evaluation.scoring.texts import parse_free, parse_short
from vopd.evaluation.scoring.yes_no import parse_yes_no

__all__ = ["ANSWER_TYPES", "Parsed", "is_correct", "parse_answer"]

ANSWER_TYPES = ("letter", "yes/no", "number", "short", "free")


def _check_type(answer_type: str) -> None:
    if answer_type not in ANSWER_TYPES:
        raise UserError(f"Answer type '{answer_type}' is unknown; use one of {', '.join(ANSWER_TYPES)}.")


def parse_answer(text: str, answer_type: str, options: Sequence[str] = ()) -> Parsed:
    """Parse one response.

    text: the raw response, special tokens and reasoning block included or not.
    answer_type: one of ANSWER_TYPES.
    options: option texts in order (letter type only), with or without labels.
    Never raises on any text; UserError for an unknown answer type.
    """
    _check_type(answer_type)
    rest = cut_reasoning(text)
    if rest is None:
        return unparsed("the reasoning block was never closed")
    if is_error(rest) and comparable(rest) not in {comparable(o) for o in option_labels(options)[1]}:
        return unparsed("an error message")
    plain = clean(rest)
    if not plain:
        return unparsed("empty")
    if answer_type == "free":
        return parse_free(plain)
    rules = {"yes/no": parse_yes_no, "number": parse_number, "short": parse_short}
    rule = rules[answer_type] if answer_type in rules else lambda text: parse_letter(text, options)
    return _committed(announced(plain, short=answer_type == "short"), rule)


def _committed(text: str, rule: Callable[[str], Parsed]) -> Parsed:
    """The rule's reading; where it finds two answers, that of what stands after the first one was taken back."""
    whole = rule(text)
    doubtful = whole.conflict or after_last_withdrawal(whole.value or "") is not None
    tail = after_last_withdrawal(text) if doubtful else None
    second = rule(tail) if tail else whole
    return second if second.committed else whole


def is_correct(parsed: Parsed, gold: str, answer_type: str) -> bool:
    """Whether a parsed answer equals the gold; unparsed is never correct.

    gold: "B" or "(b)" for letters, "yes"/"no", a number in any form, a text. UserError when the gold itself
    is not of its type.
    """
    _check_type(answer_type)
    if answer_type == "letter":
        wanted: str | None = gold.strip().strip("().").upper()
        well_formed = wanted is not None and len(wanted) == 1 and wanted.isalpha()
    elif answer_type == "yes/no":
        wanted = gold.strip().strip(".").lower()
        well_formed = wanted in ("yes", "no")
    elif answer_type == "number":
        wanted = parse_gold_number(gold)
        well_formed = wanted is not None
    else:
        return parsed.value is not None and _same_text(parsed.value, gold)
    if not well_formed:
        raise UserError(f"Gold answer '{gold}' is not of type '{answer_type}'; correct the data row.")
    return parsed.value == wanted


def _same_text(value: str, gold: str) -> bool:
    if comparable(value) == comparable(gold):
        return True
    # "five" and "5" are one answer, but only when each text is nothing but that number.
    pair = [parse_gold_number(side) for side in (value, gold)]
    return (
        pair[0] is not None and pair[0] == pair[1] and all(len(side.split()) == 1 for side in (value, gold))
    )
