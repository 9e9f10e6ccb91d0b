"""Reads the published `problem` text: question, hint sentence and options A, B, C ... in one string.

The text goes to the model as it is, but for the `<image>` marker. What is read out of it is the options (the answer
parser and validation need them) and the hint. How options are written is not documented; the three usual ways are
understood, on lines of their own or in a row. A text that does not fit is an error with a reason, never a guess.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

MARKER = "<image>"
# The authors' wording.
HINT = "Only focus on the objects inside the red bounding box in the image to answer this question."
_ANY_HINT = re.compile(r"[^.?!\n]*\bred\s+(?:bounding\s+)?box\b[^.?!\n]*[.!]", re.IGNORECASE)
_LABELS = tuple(
    re.compile(start + label)
    for start in (r"(?m:^)[ \t]*", r"(?<![\w(])")
    for label in (r"\((?P<letter>[A-Z])\)\s*", r"(?P<letter>[A-Z])[.:)](?=\s)\s*")
)
_TAIL = re.compile(
    r"\s*(?:(?:please\s+)?(?:answer|respond|reply|select|choose|give)\b[^\n]*\b(?:letter|option|choice)s?\b[^\n]*)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Question:
    """text: what the model is shown. hint: the part of it that points at the box. answer: the correct letter."""

    text: str
    hint: str
    options: tuple[str, ...]
    answer: str


def read_question(problem: str, answer: str) -> Question:
    """Takes a published row's texts apart.

    Raises:
        ValueError: with the reason why they cannot be read.
    """
    if problem.count(MARKER) != 1:
        raise ValueError(f"{problem.count(MARKER)} <image> markers instead of one")
    text = problem.replace(MARKER, "").strip()
    hint = find_hint(text)
    options = find_options(text, hint)
    letter = re.fullmatch(r"\(?([A-Z])[.):]*", answer.strip())
    if not letter:
        raise ValueError(f"answer {answer[:40]!r} is not a letter")
    if ord(letter[1]) - ord("A") >= len(options):
        raise ValueError(f"answer {letter[1]} is not one of {len(options)} options")
    return Question(text, hint, options, letter[1])


def find_hint(text: str) -> str:
    """The sentence that points at the red box: the authors' wording, else the last other one that is a statement."""
    if HINT in text:
        return HINT
    found = [match.group().strip() for match in _ANY_HINT.finditer(text)]
    if not found:
        raise ValueError("no sentence points at the red box")
    return found[-1]


def find_options(text: str, hint: str) -> tuple[str, ...]:
    """The options A, B, C ... in order. `ValueError` if there are fewer than two, or one is empty or there twice."""
    best: tuple[str, ...] = ()
    for label in _LABELS:  # a way of writing that comes first wins unless another finds more options
        for options in _runs(text, hint, label):
            if len(options) > len(best):
                best = options
    if len(best) < 2:
        raise ValueError("no options A, B, ... in the text")
    if "" in best:
        raise ValueError(f"option {chr(ord('A') + best.index(''))} is empty")
    if len(set(best)) < len(best):  # some published options differ in case alone
        raise ValueError("two options read the same")
    return best


def _runs(text: str, hint: str, label: re.Pattern[str]) -> Iterator[tuple[str, ...]]:
    """Options of every run of labels A, B, C ... in order, the last run in the text first."""
    labels = list(label.finditer(text))
    for first in reversed([i for i, match in enumerate(labels) if match["letter"] == "A"]):
        run = [labels[first]]
        for match in labels[first + 1 :]:
            if match["letter"] == chr(ord("A") + len(run)):
                run.append(match)
        ends = [match.start() for match in run[1:]] + [len(text)]
        pieces = [text[match.end() : end] for match, end in zip(run, ends, strict=True)]
        on_lines = len(pieces) > 1 and all("\n" in piece for piece in pieces[:-1])
        pieces[-1] = _last(pieces[-1], hint, on_lines)
        yield tuple(" ".join(piece.split()).rstrip(",;") for piece in pieces)


def _last(piece: str, hint: str, on_lines: bool) -> str:
    """The last option, without what follows the options: the hint, an instruction, other lines."""
    piece = piece.split(hint)[0]
    piece = piece.strip("\n").split("\n")[0] if on_lines or "\n\n" in piece else piece
    return _TAIL.sub("", piece)
