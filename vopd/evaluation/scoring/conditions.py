"""What takes an answer's force away: a condition it hangs on, and words that take a first answer back."""

from __future__ import annotations

import re

# "If I had to choose" and "if we look closely" are manners of speaking and no conditions.
_MANNER = (
    r"(?! (?:i(?: am|'m| had| have| must| read| see| look| understand| recall| remember| zoom| were"
    r"| count(?:ed)? (?:correctly|right))(?![a-z])"
    r"|(?:we|you|one) (?:look|looks|zoom|examine|inspect|consider|observe|focus|see|compare|check|read"
    r"|follow|ask|must)"
    r"|forced|pressed|pushed|my (?:eyes|reading|memory)|not mistaken|anything))"
)
_IF = (
    r"(?:if" + _MANNER + r"|unless|let(?:'s| us) (?:say|assume|suppose|imagine)(?= (?:that )?(?:the"
    r"|it))|imagine|provided|providing|assum(?:e|ing)|supposing|suppose|say(?= (?:the|it|that))"
    r"|on condition|as long as"
    r"|in case|wenn|falls|sofern|siempre que|à condition)(?![a-z])|(?:had|were|should) (?:the|it|there"
    r"|this|that|an?|any"
    r"|he|she|they|one)(?![a-z])|(?:si|se) (?:la|le|les|el|los|las|o|a|il|lo|l')(?![a-z])"
)
_OPENS = re.compile(
    r"[^\w]{0,4}(?:(?:and|then|now|well|only|even)[, ]{1,2}){0,2}(?:" + _IF + ")(?: so| not)?", re.I
)
_OPENS_ZH = re.compile("如果|假如|要是|若是?|만약|もし")
_TURN = re.compile(
    r"(?<![a-z])(?:but|so|therefore|thus|hence|however|although|though|since|because|doch|aber|mais"
    r"|donc|pero)(?![a-z])"
    r"|所以|因此|但|因为",
    re.I,
)
_THEN = re.compile(r" ?then[, ](?!again)", re.I)
_ADJOINS = re.compile(r"[)\]}]?,? \(?(?:but )?(?:only |just )?(?:" + _IF + ")", re.I)
_WITHIN = re.compile(r"(?<![a-z])(?<!even )(?:" + _IF + ")", re.I)
_WOULD = re.compile(r"(?<![a-z])(?:would|might|could)(?![a-z])|'d(?![a-z])", re.I)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。\n]")

_STRONG = (
    r"(?:wait|hold on|hang on|scratch that|strike that|correction|oops|sorry|apologies|i apologi[sz]e"
    r"|i meant?|my (?:mistake|bad|apologies)|i (?:made a mistake|misread|was wrong"
    r"|stand corrected|misspoke|take that back)|(?:no|hmm|sorry|actually|oh)[,.]? (?:wait|no|that)"
    r"|no[.!]|no, (?:it|that|the|this|there|i|on|looking|because|since)|(?:that|this)(?: is|'s| was"
    r"| is clearly| can) ?"
    r"(?:not(?: be)? (?:right|correct|true)|n't (?:right|correct)|wrong|incorrect|a mistake)|that can't be"
    r"|let me (?:re[a-z]{1,12}|correct|double|check again|look again|think again|fix)|hmm"
    r"|i (?:need|have|want|must|should)(?: to)? (?:correct|re[a-z]{1,12}))(?![a-z])"
)
_SOFT = (
    r"(?:actually|on (?:second thought|closer|reflection|a (?:second|closer) look)|looking (?:again"
    r"|closer|more closely))"
    r"(?![a-z])"
)
_TAKEN_BACK = re.compile(
    r"(?:(?<=[.?!\n…])|(?<=[—–-])|(?<=, ))[ \"]{0,2}(?:(?:but|oh|hm+|um|ah|well)[,.… ]{1,3}){0,2}(?:"
    + _STRONG
    + "|"
    + _SOFT
    + r")|(?:不对|不對|等等|等一下|更正|不[,。]|아니,|いや)",
    re.I,
)
_AT_ONCE = re.compile(
    r"[)\]}]{0,2} ?(?:[.?!…,—–-] ?){1,4}\n?(?:(?:but|oh|hm+|um|ah|well)[,.… ]{1,3}){0,2}"
    + _STRONG
    + r"|[?,.!]? ?(?:不对|不對|不[,。]|等等|更正|아니,|いや)",
    re.I,
)
_CONFIRMED = re.compile(
    r"(?<![a-z])(?:yes|confirm(?:s|ed)?|still|indeed|stands|correct|(?:is|was|that's) right)(?![a-z])", re.I
)


def _sentence(text: str, start: int, end: int) -> tuple[str, str]:
    """What stands in the sentence before `start` and after `end`, 200 characters of each at most."""
    before = text[max(0, start - 200) : start]
    ends = [m.end() for m in _SENTENCE_END.finditer(before)]
    after = text[end : end + 200]
    stop = _SENTENCE_END.search(after)
    return before[ends[-1] if ends else 0 :], after[: stop.start()] if stop else after


def conditional(text: str, start: int, end: int) -> bool:
    """Whether the answer that stands from `start` to `end` hangs on a condition in its sentence."""
    before, after = _sentence(text, start, end)
    if _THEN.match(before):  # "Suppose it is lit. Then the answer is B."
        before = _sentence(text, max(0, start - len(before) - 1), start)[0] + " " + before
    opens = _OPENS.match(before) or _OPENS_ZH.search(before)
    if opens and not _TURN.search(before, opens.end()):
        return True
    clause = re.split(r"[,;:]|(?<![a-z])(?:but|so|and)(?![a-z])", before)[-1]
    would = _WOULD.search(clause) or _WOULD.match(after, 1)
    turn = _TURN.search(after)
    within = _WITHIN.search(after, 0, turn.start() if turn else len(after)) if would else None
    return within is not None or _ADJOINS.match(after) is not None


def withdrawn(text: str, end: int) -> bool:
    """Whether the words after an answer that ends at `end` doubt it at once and nothing confirms it later."""
    doubt = _AT_ONCE.match(text, end)
    return doubt is not None and not _CONFIRMED.search(text, doubt.end(), doubt.end() + 600)


def after_last_withdrawal(text: str) -> str | None:
    """What stands after the last words that take an answer back; None without such words."""
    found = list(_TAKEN_BACK.finditer(text))
    return text[found[-1].end() :].lstrip(" ,.:;!?-–—\n") if found else None
