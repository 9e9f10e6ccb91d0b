"""The texts of a published row taken apart: options in the ways they are written, hints, and what is refused."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.vision_opd_6k.question import HINT, read_question

WORDS = ["red car", "3.5 m", "St. John's Street", "blue, with dots", "none", "(unclear)", "7", "Exit A"]
words = st.text(string.ascii_lowercase + string.digits + "'-", min_size=1, max_size=9)
option = st.lists(words, min_size=1, max_size=4).map(" ".join)
STYLES = {
    "lines dot": "\n{}. {}",
    "lines bracket": "\n{}) {}",
    "lines brackets": "\n({}) {}",
    "lines colon": "\n{}: {}",
    "row dot": " {}. {}",
    "row brackets": " ({}) {}",
    "row bracket, comma": " {}) {},",
}


def written(style: str, options: list[str]) -> str:
    return "".join(STYLES[style].format(letter, o) for letter, o in zip("ABCDEFGH", options, strict=False))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("order", ["hint last", "hint first", "hint and instruction"])
@given(options=st.lists(option, min_size=2, max_size=6, unique_by=str.casefold), data=st.data())
def test_options_hint_and_text(style: str, order: str, options: list[str], data: st.DataObject) -> None:
    right = data.draw(st.sampled_from("ABCDEF"[: len(options)]))
    asked, listed = "What is written on the sign?", written(style, options)
    text = {
        "hint last": f"{asked}{listed}\n{HINT}",
        "hint first": f"{asked} {HINT}{listed}",
        "hint and instruction": f"{asked}{listed}\n{HINT}\nAnswer with the option's letter directly.",
    }[order]
    question = read_question("<image>\n" + text, right)
    assert question.text == text and question.hint == HINT and question.answer == right
    assert list(question.options) == options


@pytest.mark.parametrize("style", ["lines dot", "lines brackets", "row dot"])
def test_options_with_signs_in_them(style: str) -> None:
    for start in range(0, len(WORDS), 4):
        options = WORDS[start : start + 4]
        text = f"<image>What is it?{written(style, options)}\n{HINT}"
        assert list(read_question(text, "C").options) == options


@pytest.mark.parametrize("answer", ["B", " B ", "(B)", "B.", "B)"])
def test_ways_to_write_the_answer(answer: str) -> None:
    assert read_question(f"<image>Who?\nA. one\nB. two\n{HINT}", answer).answer == "B"


def test_options_that_differ_in_case_alone_are_kept() -> None:
    text = f"Which word?\n\n{HINT}\n\nA. Open\nB. OPEN\n\nAnswer with the option's letter from the given choices."
    question = read_question(f"<image>\n{text}", "B")
    assert question.options == ("Open", "OPEN") and question.text == text and question.hint == HINT


def test_another_hint_is_found() -> None:
    text = "What is in the red box?\nA. one\nB. two\nLook at the red box only. Take your time."
    question = read_question("<image>" + text, "A")
    assert question.hint == "Look at the red box only." and question.options == ("one", "two")


def test_a_marker_in_the_middle_leaves_the_rest() -> None:
    assert read_question(f"Look: <image>\nA. one\nB. two\n{HINT}", "A").text.startswith("Look: \nA. one")


@pytest.mark.parametrize(
    ("problem", "answer", "why"),
    [
        (f"Who?\nA. one\nB. two\n{HINT}", "A", "0 <image> markers"),
        (f"<image><image>Who?\nA. one\nB. two\n{HINT}", "A", "2 <image> markers"),
        ("<image>Who?\nA. one\nB. two", "A", "no sentence points at the red box"),
        (f"<image>Who?\n{HINT}", "A", "no options"),
        (f"<image>Who?\nA. one\n{HINT}", "A", "no options"),
        (f"<image>Who?\nB. one\nC. two\n{HINT}", "B", "no options"),
        (f"<image>Who?\nA. one\nB. one\n{HINT}", "A", "read the same"),
        (f"<image>Who?\nA. \nB. two\n{HINT}", "A", "option A is empty"),
        (f"<image>Who?\nA. one\nB. two\n{HINT}", "C", "not one of 2 options"),
        (f"<image>Who?\nA. one\nB. two\n{HINT}", "one", "is not a letter"),
        (f"<image>Who?\nA. one\nB. two\n{HINT}", "", "is not a letter"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_reason(problem: str, answer: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read_question(problem, answer)


@given(st.text(max_size=300), st.text(max_size=5))
def test_any_text_is_read_or_refused(problem: str, answer: str) -> None:
    try:
        question = read_question("<image>" + problem, answer)
    except ValueError:
        return
    assert question.hint in question.text and len(set(question.options)) == len(question.options) >= 2
