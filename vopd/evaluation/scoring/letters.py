"""Multiple choice: which option letter does a response commit itself to?

A response makes *claims*; each has a place, a letter (or "unclear") and a rank. The rule order:
  1. the whole response is the text of exactly one option -> that option;
  2. FINAL    a box, an <answer> tag, "final answer ...";
  3. MARKED   "Answer: ...", "Option: ...", and in Chinese;
  4. LAST     the last line is a bare letter; only if no other line opens with another letter;
  5. PROSE    "the answer is B", "I choose B", "B is correct", "so B", a response opening with "B." or "(B)";
  6. WEAK     a last line "B) text" outside a list of options; the only bracketed letter; the only letter that has
              its own option's text beside it ("matches D (yellow)"); a response of one sentence whose predicate is one
              option's text ("The car is blue.").
The highest rank present decides, so a marked statement overrides the reasoning before it -- but nothing after
it: a later claim of another letter, or two letters within the rank, make the response unparsed -- unless
the text takes the first one back ("no, wait"): then what follows decides. A MARKED statement whose content is neither
a letter nor one option's whole text also voids all claims before it. Negated ("not A", "A is wrong", "anything but
A"), conditional ("A if ..."), questioned and at once doubted letters are no claims; nor is the article "a".

Options that are themselves letters: a letter that labels an option is that label, in every kind of statement, and
never another option's text. A sentence that says what the picture shows ("The letter is A") is no statement of a
label; where it names the very letter that is then answered, and another option reads so, the response is unparsed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from vopd.evaluation.scoring import letter_patterns as pattern
from vopd.evaluation.scoring.announced import REJECTION
from vopd.evaluation.scoring.clean import BOX_CLOSE, BOX_OPEN, comparable, strip_lead_in
from vopd.evaluation.scoring.conditions import conditional, withdrawn
from vopd.evaluation.scoring.numbers import parse_gold_number
from vopd.evaluation.scoring.parsed import Parsed, parsed, unparsed

DEFAULT_LABELS = "ABCDEFGH"  # when the caller names no options
UNCLEAR = "?"


class Rank(IntEnum):
    """Strength of a claim; see the module docstring."""

    FINAL = 1
    MARKED = 2
    LAST = 3
    PROSE = 4
    WEAK = 5


@dataclass(frozen=True)
class Claim:
    """One statement of an answer: character position, option letter or UNCLEAR, strength."""

    place: int
    letter: str
    rank: Rank
    why: str


_LABEL = re.compile(r"^\s*[(（]?([A-Za-z])\s?[.):）：．、]\s*(?=\S)")  # full-width as published


def option_labels(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Letters and bare texts of the options; a label inside an option's text ("(A) red") is taken from it."""
    own = [_LABEL.match(option) for option in options]
    positions = [chr(ord("A") + i) for i in range(len(options))]
    labels = [m[1].upper() for m in own if m]
    if options and labels == positions:
        return labels, [option[m.end() :] for option, m in zip(options, own, strict=True) if m]
    return positions if options else list(DEFAULT_LABELS), list(options)


def _is_article(text: str, letter: str, end: int, bracketed: bool) -> bool:
    return letter in "AI" and not bracketed and pattern.ARTICLE_TAIL.match(text, end) is not None


def _denied_before(text: str, start: int, place: int) -> bool:
    """Whether the clause up to `place`, looked at from 80 characters before `start`, denies or only supposes."""
    clause = pattern.CLAUSE_BREAK.split(text[max(0, start - 80) : place])[-1]
    return pattern.DENIED_BEFORE.search(clause) is not None


def _rejected(text: str, start: int) -> bool:
    """Whether the words right before `start` reject what follows, or ask for what is wrong."""
    return REJECTION in text[max(0, start - 8) : start] or bool(
        pattern.WRONG_ASKED.search(text[max(0, start - 80) : start])
    )


def _read(text: str, match: re.Match[str], rank: Rank, why: str, labels: Sequence[str]) -> Claim | None:
    """The claim at a matched letter (the match's last group), or None when it only looks like one."""
    group = match.lastindex or 1
    raw, place, end = match[group], match.start(group), match.end(group)
    closing = pattern.CLOSING.match(text, end)
    bracketed = (
        closing is not None
        and place > 0
        and text[max(0, place - 2) : place].rstrip(" ")[-1:] in ("(", BOX_OPEN)
    )
    if raw.islower() and not bracketed and not pattern.LOWER_TAIL.match(text, end):
        return None
    if _is_article(text, raw, end, bracketed):
        return None
    end = closing.end() if closing else end
    if pattern.DENIED_AFTER.match(text, end) or _rejected(text, place) or _rejected(text, match.start()):
        return None
    asked = re.match(r" ?\?", text[end : end + 2])
    either = text[max(0, match.start() - 3) : match.start()].lower() == "or "
    if rank >= Rank.PROSE and (asked or either or _denied_before(text, match.start(), place)):
        return None
    if withdrawn(text, end) or conditional(text, min(match.start(), place), max(end, match.end())):
        return None
    letter = raw.upper()
    if letter not in labels:
        return Claim(place, UNCLEAR, rank, "a letter that is no option") if rank <= Rank.MARKED else None
    other = pattern.OTHER_LETTER.match(text, end)
    if other and other[1] != letter and other[1] in labels:
        article = _is_article(text, other[1], other.end(1), False)
        if not article and not pattern.DENIED_AFTER.match(text, other.end(1)):
            return Claim(place, UNCLEAR, rank, "two letters in one statement")
    return Claim(place, letter, rank, why)


def _match_option(claim: str, labels: Sequence[str], texts: Sequence[str]) -> str | None:
    """Letter of the only option whose text is the whole claim."""
    own = {
        label.lower()
        for label, option in zip(labels, texts, strict=False)
        if comparable(option) != label.lower()
    }
    wanted = {comparable(claim), comparable(strip_lead_in(claim))} - {""} - own
    if comparable(claim) in ("that's right", "that is right", "all right"):  # agreement, not a side
        return None
    hits = [label for label, option in zip(labels, texts, strict=False) if comparable(option) in wanted]
    if not hits and claim.strip(" .").isalpha():  # "seven" where the option is "7"
        number = parse_gold_number(claim)
        hits = [label for label, option in zip(labels, texts, strict=False) if option.strip() == number]
    return hits[0] if len(hits) == 1 else None


def _predicate(text: str, labels: Sequence[str], texts: Sequence[str]) -> str | None:
    """Option whose whole text is what a response of one sentence says of its subject."""
    if len(text) > 200 or text.rstrip(".!。").count(".") or "\n" in text or text.endswith("?"):
        return None
    for match in pattern.PREDICATE.finditer(text):
        subject = text[: match.end(1)]
        if pattern.NO_SUBJECT.search(subject) or pattern.DENIED_BEFORE.search(subject):
            return None
        said = text[match.end() :]
        if comparable(said) in ("right", "correct", "true", "false"):
            continue  # "You are right." agrees with somebody; it names no side
        letter = _match_option(said, labels, texts)
        others = (comparable(t) for label, t in zip(labels, texts, strict=False) if label != letter)
        if letter and not any(
            re.search(rf"(?<!\w){re.escape(o)}(?!\w)", subject.casefold()) for o in others if o
        ):
            return letter
    return None


def _with_own_text(text: str, labels: Sequence[str], texts: Sequence[str]) -> list[re.Match[str]]:
    """Places of the only letter that its own option's text follows directly, where words introduce it."""
    own = {label: comparable(option) for label, option in zip(labels, texts, strict=False)}
    found = []
    for match in pattern.WITH_TEXT.finditer(text):
        option = own.get(match[1])
        rest = re.sub(r"^(?:an?|the) ", "", text[match.end() : match.end() + 400].casefold())
        if option and rest.startswith(option) and not rest[len(option) : len(option) + 1].isalnum():
            found.append(match)
    if len({m[1] for m in found}) != 1:  # several are a list of the options
        return []
    return [m for m in found if pattern.INTRODUCES.search(text[max(0, m.start() - 30) : m.start()])]


def _stated_text(text: str, start: int, labels: Sequence[str], texts: Sequence[str]) -> str | None:
    """Option named by its text from `start` to the end of the line or of the sentence."""
    line = text[start : start + 400].split("\n", 1)[0].split(BOX_CLOSE, 1)[0]
    sentence = re.split(r"[.;!?。](?: |$)|,? because(?![a-z])", line, maxsplit=1)[0]
    for content in (line, sentence):
        letter = _match_option(content, labels, texts)
        if letter:
            return letter
    return None


def _boxed(text: str, labels: Sequence[str], texts: Sequence[str]) -> Iterator[Claim]:
    for box in re.finditer(BOX_OPEN + "([^" + BOX_OPEN + BOX_CLOSE + "]{0,2000})" + BOX_CLOSE, text):
        content = box[1].strip()
        if conditional(text, box.start(), box.end()) or withdrawn(text, box.end()):
            continue
        letter = _match_option(content, labels, texts)
        if letter is None:
            inner = decide(content, labels, texts) if content else unparsed("empty")
            letter = inner.value or UNCLEAR
        yield Claim(box.start(), letter, Rank.FINAL, "boxed")


def _marked(text: str, labels: Sequence[str], texts: Sequence[str]) -> Iterator[Claim]:
    listed = _listed(text)
    for match in pattern.FINAL.finditer(text):
        start = match.start(1)
        stated = _stated_text(text, start, labels, texts)
        claim = _read(text, match, Rank.FINAL, "final answer", labels)
        if stated or claim:
            yield Claim(start, stated, Rank.FINAL, "final answer, option text") if stated else claim  # type: ignore[misc]
    for match in (*pattern.MARK.finditer(text), *pattern.SOFT_MARK.finditer(text)):
        before = text[max(0, match.start() - 6) : match.start()].lower()
        rank = Rank.FINAL if before == "final " else Rank.MARKED
        stated = _stated_text(text, match.end(), labels, texts)
        if stated:
            yield Claim(match.end(), stated, rank, "marked answer, option text")
            continue
        letter = pattern.FILL_LETTER.match(text, match.end())
        # "Let's look at each option:\nA) red\nB) blue" introduces a list, not an answer.
        introduces = letter and letter.start(1) in listed and "\n" in text[match.start() : letter.start(1)]
        claim = _read(text, letter, rank, "marked answer", labels) if letter and not introduces else None
        if claim:
            yield claim
        elif (
            not introduces
            and match.re is pattern.MARK
            and text[match.end() : match.end() + 1] not in ("", BOX_OPEN, " ")
        ):
            yield Claim(match.end(), "", rank, "a marked answer that names no option")
    for match in pattern.MARK_NO_COLON.finditer(text):
        claim = _read(text, match, Rank.MARKED, "marked answer", labels)
        if claim and not _denied_before(text, match.start(), match.start()):
            yield claim


def _listed(text: str) -> set[int]:
    """Places of labels that belong to a repeated list of options: neighbours in the alphabet, in order."""
    found = [(m.start(1), m[1]) for m in pattern.LABELLED.finditer(text)]
    places: set[int] = set()
    for (place, letter), (next_place, next_letter) in itertools.pairwise(found):
        if ord(next_letter) == ord(letter) + 1:
            places |= {place, next_place}
    return places


def _prose(text: str, labels: Sequence[str], texts: Sequence[str]) -> Iterator[Claim]:
    opening = pattern.OPENING.match(text)
    # A lower-case opening letter counts only as a label: "a) red", "b. blue", not "a red car".
    if opening and opening.start(1) not in _listed(text):
        label = opening[1].isupper() or re.match(r" ?[).:]", text[opening.end(1) :][:2])
        claim = _read(text, opening, Rank.PROSE, "opening letter", labels) if label else None
        if claim:
            yield claim
    for match in pattern.ANSWER_IS.finditer(text):
        stated = _stated_text(text, match.end(), labels, texts)
        supposed = stated and conditional(text, match.start(), match.end())
        if stated and not supposed and not _denied_before(text, match.start(), match.start()):
            yield Claim(match.end(), stated, Rank.PROSE, "option text")
    phrases = [
        pattern.THE_ANSWER_IS,
        pattern.I_CHOOSE,
        pattern.POINTS_TO,
        pattern.ANSWER_IS_ZH,
        pattern.CHOOSE_ZH,
        pattern.IS_CORRECT,
    ]
    # Where options are themselves letters, "it is B" may describe the picture.
    if not any(len(option.strip()) == 1 and option.strip().isalpha() for option in texts):
        phrases += [pattern.SO, pattern.CONCEDED, pattern.CLOSING_SENTENCE]
    for phrase in phrases:
        for match in phrase.finditer(text):
            claim = _read(text, match, Rank.PROSE, "stated in prose", labels)
            if claim:
                yield claim


def _only_judged_right(text: str) -> re.Match[str] | None:
    """The one line that calls its option right where every other labelled line calls its own wrong."""
    judged = list(pattern.JUDGED.finditer(text))
    right = [m for m in judged if m[2]]
    labelled = {m[1] for m in pattern.LABELLED.finditer(text)}
    return right[0] if len(right) == 1 and len(judged) > 1 and labelled <= {m[1] for m in judged} else None


def _stands_alone(text: str, labels: Sequence[str]) -> list[re.Match[str]]:
    """Option letters that stand alone in the text, articles and denied ones aside."""
    found = []
    for match in pattern.STANDALONE.finditer(text):
        article = _is_article(text, match[1], match.end(1), False)
        if match[1] in labels and not article and not pattern.DENIED_AFTER.match(text, match.end(1)):
            found.append(match)
    return found


def _beside_its_text(text: str, labels: Sequence[str], texts: Sequence[str]) -> Claim | None:
    """The only letter of the response, where it follows its option's text ("blue, so (B)") or a closing colon."""
    alone = _stands_alone(text, labels)
    if not texts or len({m[1] for m in alone}) != 1 or any(len(option.strip()) == 1 for option in texts):
        return None
    match = alone[-1]
    start = max((m.end() for m in re.finditer(r"[.!?。\n]", text[: match.start()])), default=0)
    sentence = text[start : match.start()]
    stated = {
        label
        for label, option in zip(labels, texts, strict=False)
        if re.search(rf"(?<![a-z0-9]){re.escape(comparable(option))}(?![a-z0-9])", sentence.casefold())
    }
    closes = pattern.CLOSING_LETTER.search(text) and pattern.CONCLUDES.search(sentence)
    if (
        pattern.SUPPOSED.search(sentence)
        or REJECTION in sentence
        or not (stated == {match[1]} or (closes and not stated))
    ):
        return None
    return _read(text, match, Rank.WEAK, "the only letter, with its option's text", labels)


def _lines(text: str, labels: Sequence[str], texts: Sequence[str]) -> Iterator[Claim]:
    bare = [m for m in pattern.BARE_LINE.finditer(text) if m[1].upper() in labels]
    bare = [m for m in bare if not withdrawn(text, m.end(1)) and not _rejected(text, m.start())]
    for match in bare:
        rank = Rank.LAST if match.end() == len(text) else Rank.PROSE
        yield Claim(match.start(1), match[1].upper(), rank, "a line with only a letter")
    start = text.rfind("\n") + 1
    if start:
        stated = _stated_text(text, start, labels, texts)
        if stated:
            yield Claim(start, stated, Rank.LAST, "last line, option text")
    label = pattern.LABELLED.match(text, start)
    named = _match_option(text[label.end() :], labels, texts) if label else None
    # "A: blue", where blue is option B, is an answer to a "Q:" rather than option A.
    if label and label.start(1) not in _listed(text) and named in (None, label[1]):
        claim = _read(text, label, Rank.WEAK, "labelled last line", labels)
        if claim:
            yield claim
    paired = _with_own_text(text, labels, texts)
    if paired:
        claim = _read(text, paired[-1], Rank.WEAK, "the only letter beside its own text", labels)
        if claim:
            yield claim
    judged = _only_judged_right(text)
    if judged and judged[1] in labels:
        yield Claim(judged.start(1), judged[1], Rank.WEAK, "the only option called right")
    alone = _beside_its_text(text, labels, texts)
    if alone:
        yield alone
    predicate = _predicate(text, labels, texts)
    if predicate:
        yield Claim(0, predicate, Rank.WEAK, "a sentence that states one option's text")
    brackets = [m for m in pattern.BRACKETED.finditer(text) if m[1] in labels]
    if len({m[1] for m in brackets}) == 1:
        claim = _read(text, brackets[-1], Rank.WEAK, "only bracketed letter", labels)
        if claim:
            yield claim


def decide(text: str, labels: Sequence[str], texts: Sequence[str]) -> Parsed:
    """Apply the rule order to a cleaned text."""
    whole = _match_option(text, labels, texts)
    if whole:
        return parsed(whole, "whole response is one option's text")
    spaced = re.match(r"([A-Z]) (.+)$", text)
    if spaced and spaced[1] in labels and _match_option(spaced[2], labels, texts) == spaced[1]:
        return parsed(spaced[1], "letter and option text")
    claims = [
        *_boxed(text, labels, texts),
        *_marked(text, labels, texts),
        *_prose(text, labels, texts),
        *_lines(text, labels, texts),
    ]
    void = max((c.place for c in claims if not c.letter), default=-1)
    claims = [c for c in claims if c.letter and c.place >= void]
    if not claims:
        return unparsed("a marked answer that names no option" if void >= 0 else "no option is stated")
    rank = min(c.rank for c in claims)
    deciding = [c for c in claims if c.rank == rank]
    last = max(deciding, key=lambda c: c.place)
    rivals = {c.letter for c in deciding}
    rivals |= {c.letter for c in claims if c.place > last.place and c.rank < Rank.WEAK}
    if rank == Rank.LAST:
        rivals |= {c.letter for c in claims if c.why in ("a line with only a letter", "opening letter")}
    if rank == Rank.PROSE and last.letter != UNCLEAR:  # "either A or B; I'd go with B" commits in the end
        rivals -= {UNCLEAR}
    if UNCLEAR in rivals:
        return unparsed(next(c.why for c in claims if c.letter == UNCLEAR))
    if len(rivals) > 1:
        return unparsed("two different answers: " + ", ".join(sorted(rivals)))
    return parsed(last.letter, last.why)


def _names_a_text(text: str, letter: str, labels: Sequence[str], texts: Sequence[str]) -> bool:
    """Whether a sentence says that the picture shows `letter`, which is another option's text."""
    texts_of = dict(zip(labels, texts, strict=False))
    others = [comparable(option) for label, option in texts_of.items() if label != letter]
    if comparable(letter) not in others:
        return False
    shown = re.compile(rf"(?:an? )?{letter}(?![\w'])")
    return any(
        shown.match(text, m.end()) and not pattern.NO_SUBJECT.search(m[1])
        for m in pattern.PREDICATE.finditer(text)
    )


def parse_letter(text: str, options: Sequence[str] = ()) -> Parsed:
    """Option letter of a cleaned response (see the module docstring for the rule order)."""
    labels, texts = option_labels(options)
    if options and all(re.match(r"\(?[a-z]\W", option) for option in options):
        text = pattern.LOWER_LABEL.sub(lambda m: m[0].upper(), text)
    text = pattern.SAID_TWICE.sub(r"(\1)", text)
    result = decide(text, labels, texts)
    if result.value and _names_a_text(text, result.value, labels, texts):
        return unparsed("the letter may be a label or an option's text")
    return result
