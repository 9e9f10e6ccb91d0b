"""What the model is asked at each stage, and the shape of the JSON it must answer with."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints

LONGEST_ANSWER = 80
Line = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=300)]
ShortLine = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=LONGEST_ANSWER)]


class Objects(BaseModel):
    """Reply to `objects`."""

    objects: list[ShortLine]


class Questions(BaseModel):
    """Reply to `ask`."""

    questions: list[Line] = Field(min_length=1)


class Verdict(BaseModel):
    """Reply to `validate`."""

    valid: bool
    why: str = ""


class Distractors(BaseModel):
    """Reply to `options`."""

    distractors: list[ShortLine]


def objects() -> str:
    """Names of things for an open-vocabulary detector."""
    return (
        "List the small things in this picture that can be told apart: objects, signs, labels, parts of objects. "
        "Name each by one to three words.\n"
        'Reply with JSON only: {"objects": ["...", "..."]}'
    )


def ask(count: int) -> str:
    """Questions about a crop."""
    return (
        f"This picture is a small part of a larger photograph. Write {count} different questions about it. Each must "
        "have one short answer (a word, a number or a short phrase) that the picture itself shows without doubt: a "
        "colour, a count, written text, a shape, a material, what a thing is. No yes-or-no questions, no guesses about "
        "what lies outside, no general knowledge, and no mention of a picture, crop or photograph.\n"
        'Reply with JSON only: {"questions": ["...", "..."]}'
    )


def validate(question: str) -> str:
    """Whether a question is worth answering."""
    return (
        f"Question: {question}\n"
        "Is this a good question about this picture? It is good if the picture alone answers it, if there is exactly "
        "one right answer, if that answer is short, and if nobody could guess it without looking.\n"
        'Reply with JSON only: {"valid": true or false, "why": "..."}'
    )


def answer(question: str) -> str:
    """One answer."""
    return f"{question}\nAnswer with a word, a number or a short phrase, and nothing else."


def options(question: str, right: str) -> str:
    """Wrong options beside a right answer."""
    return (
        f"Question: {question}\nRight answer: {right}\n"
        "Write 3 wrong answers of the same kind and length that someone who did not look closely could give. They must "
        "be clearly wrong for this picture, and differ from each other.\n"
        'Reply with JSON only: {"distractors": ["...", "...", "..."]}'
    )
