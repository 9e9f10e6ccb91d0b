"""The answer parser: files of crafted responses, kept records, and properties on arbitrary text."""

import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vopd.errors import UserError
from vopd.evaluation.scoring import ANSWER_TYPES, Parsed, is_correct, parse_answer
from vopd.evaluation.scoring import table as scoring_table
from vopd.evaluation.scoring.official import is_right, parse_official

CRAFTED = [
    json.loads(line)
    for line in (Path(__file__).parent / "crafted_responses.jsonl").read_text(encoding="utf-8").splitlines()
]
FRESH = [
    json.loads(line)
    for line in (Path(__file__).parent / "fresh_responses.jsonl").read_text(encoding="utf-8").splitlines()
]
RECORDS = Path(__file__).parents[3] / "docs" / "results"
COLOURS = ["red", "blue", "green", "yellow"]
# Prefixes that state no answer of their own and open no reasoning block.
BENIGN = st.text(
    alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="ABCDEFGH⟦⟧<>\\"), max_size=80
).filter(lambda text: "error" not in text.lower())


def misread(row: dict) -> str:
    """What is wrong with the reading of a crafted response; empty where nothing is."""
    result = parse_answer(row["response"], row["answer_type"], row["options"])
    unparsed = row["expected"] is None
    if result.value != row["expected"] or (result.state == "unparsed") != unparsed:
        return f"{row['response']!r} is read as {result}, not as {row['expected']!r}"
    if unparsed and is_correct(result, row["gold"], row["answer_type"]):
        return f"{row['response']!r} states no answer and counts as correct"
    return ""


@pytest.mark.parametrize("answer_type", ANSWER_TYPES)
def test_every_crafted_response_is_read_as_expected(answer_type: str) -> None:
    """One test for a type's rows, so that they do not count as a thousand tests; every misread row is named."""
    rows = [(number, row) for number, row in enumerate(CRAFTED, start=1) if row["answer_type"] == answer_type]
    wrong = [f"line {number}: {what}" for number, row in rows if (what := misread(row))]
    assert not wrong, f"{len(wrong)} of {len(rows)} rows of crafted_responses.jsonl:\n" + "\n".join(wrong)


def test_a_misread_response_is_named() -> None:
    row = {"response": "Answer: B", "answer_type": "letter", "options": COLOURS, "gold": "A"}
    assert misread({**row, "expected": "B"}) == ""
    assert misread({**row, "expected": "A"}).startswith("'Answer: B' is read as")
    assert misread({**row, "expected": None}).endswith("not as None")


def test_the_crafted_set_covers_every_type_and_both_outcomes() -> None:
    seen = {(row["answer_type"], row["expected"] is None) for row in CRAFTED}
    assert seen == {(kind, outcome) for kind in ANSWER_TYPES for outcome in (True, False)}
    assert len(CRAFTED) >= 160


def test_no_fresh_response_is_misread_and_two_stay_unread() -> None:
    """Measured once before this state (docs/evaluation.md); the kinds that were misread then are fixed."""
    assert len(FRESH) >= 150
    crafted = {(row["response"], str(row["options"]), row["answer_type"]) for row in CRAFTED}
    assert not [r for r in FRESH if (r["response"], str(r["options"]), r["answer_type"]) in crafted]
    found = [(scoring_table.outcome(row, "strict"), row["response"]) for row in FRESH]
    assert [text for what, text in found if what == "misread"] == []
    assert [text for what, text in found if what == "missed"] == [
        "Counting the basement, one would get C, but the basement does not count: B.",
        "<answer>A</thinking>",
    ]


def test_responses_of_the_kept_runs_are_read_as_they_were_recorded() -> None:
    """The first 100 records of each file, which hold the questions' options in the prompt."""
    read = 0
    for file in sorted(RECORDS.glob("**/records/after.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            records = [json.loads(line) for line, _ in zip(lines, range(100), strict=False)]
        for record in records:
            options = re.findall(r"[A-H]\) (.+?)(?= [A-H]\) | Only look|$)", record["prompt"])
            assert parse_answer(record["response"], "letter", options).value == record["parsed"], record
            read += 1
    assert read >= 2000


@given(st.text(max_size=300), st.sampled_from(ANSWER_TYPES))
def test_never_raises_and_reports_a_consistent_state(text: str, answer_type: str) -> None:
    result = parse_answer(text, answer_type, COLOURS if answer_type == "letter" else ())
    assert (result.value is None) == (result.state == "unparsed")
    assert result.reason


PIECES = st.sampled_from(
    "A B C D a b answer Answer: is the not or and ( ) . , : \n \\boxed{ } <think> </think> <answer> </answer>"
    " final 5 1,000 yes no so 答案 是 选 option ? ** $ - Error: red".split(" ")
)


@settings(max_examples=300)
@given(st.lists(PIECES, max_size=25), st.sampled_from(ANSWER_TYPES))
def test_never_raises_on_answer_like_fragments(pieces: list[str], answer_type: str) -> None:
    result = parse_answer(" ".join(pieces), answer_type, COLOURS)
    if answer_type == "letter" and result.value is not None:
        assert result.value in "ABCD"
    if answer_type == "yes/no" and result.value is not None:
        assert result.value in ("yes", "no")


@given(BENIGN, st.sampled_from("ABCD"))
def test_a_marked_letter_at_the_end_decides(prefix: str, letter: str) -> None:
    assert parse_answer(f"{prefix} ... Answer: {letter}", "letter", COLOURS).value == letter


@given(BENIGN, st.sampled_from(["yes", "no"]))
def test_a_marked_word_at_the_end_decides(prefix: str, word: str) -> None:
    assert parse_answer(f"{prefix} ... Final answer: {word}", "yes/no").value == word


@given(
    st.sampled_from(["answer", "Answer", "ANSWER", "aNsWeR", "Final answer", "FINAL ANSWER"]),
    st.sampled_from([":", " :", ": ", ":  ", ":\n", " : \n", "：", ":\t"]),
    st.sampled_from(["{}", "({})", "**{}**", "{}.", " {} ", "[{}]", "\\boxed{{{}}}"]),
    st.sampled_from("ABCD"),
    st.booleans(),
)
def test_white_space_and_case_of_the_marker_do_not_matter(
    word: str, separator: str, form: str, letter: str, lower: bool
) -> None:
    text = word + separator + form.format(letter.lower() if lower else letter)
    assert parse_answer(text, "letter", COLOURS).value == letter


STATED = st.sampled_from(["{}", "({})", "option {}", "**{}**", "{}.", "({})."])


@given(
    st.sampled_from(
        ["Anything but ", "All except ", "Wrong answer: ", "The wrong answer is ", "Incorrect option: ", "Not ",
         "The answer is not ", "Answer: not ", "Which one is wrong? ", "It would be a mistake to choose ",
         "Falsche Antwort: ", "Mauvaise réponse : ", "Respuesta incorrecta: ", "错误答案：", "오답: ", "不正解は"]
    ),
    STATED,
    st.sampled_from("ABCD"),
)  # fmt: skip
def test_a_rejected_letter_is_no_answer(rejects: str, form: str, letter: str) -> None:
    assert parse_answer(rejects + form.format(letter), "letter", COLOURS).value is None


@given(
    st.sampled_from(
        ["The answer would be {} if the light were on", "If the light is on, the answer is {}",
        "Answer: {} if it is lit",
         "{} would be correct if it were lit", "Were the light on, the answer would be {}", "如果灯亮着，答案是{}",
         "Unless the sign is fake, the answer is {}", "\\boxed{{{}}} if it is lit",
        "Suppose it is lit. Then the answer is {}",
         "Si la lumière est allumée, la réponse est {}"]
    ),
    st.sampled_from("ABCD"),
    st.sampled_from(["", "."]),
)  # fmt: skip
def test_an_answer_that_hangs_on_a_condition_is_none(text: str, letter: str, end: str) -> None:
    assert parse_answer(text.format(letter) + end, "letter", COLOURS).value is None


@given(
    st.sampled_from(["Answer: {}", "The answer is {}", "\\boxed{{{}}}", "Final answer: {}", "Answer: ({})"]),
    st.sampled_from(["? No. ", ". Wait, no. ", ".\n\nHmm, that is not right. ", ". Actually, ",
        ". Correction: ", ".\nScratch that. "]),
    st.sampled_from(["the answer is {}.", "Answer: {}", "\\boxed{{{}}}"]),
    st.permutations("ABCD"),
)  # fmt: skip
def test_an_answer_taken_back_gives_way_to_the_next(
    first: str, back: str, second: str, letters: list[str]
) -> None:
    text = first.format(letters[0]) + back + second.format(letters[1])
    assert parse_answer(text, "letter", COLOURS).value == letters[1]


@given(st.permutations("ABCD"), st.sampled_from("ABCD"))
def test_where_options_are_letters_every_statement_means_the_label(options: list[str], letter: str) -> None:
    for text in (
        "{}",
        "Answer: {}",
        "The answer is {}.",
        "\\boxed{{{}}}",
        "<answer>{}</answer>",
        "I choose {}.",
    ):
        assert parse_answer(text.format(letter), "letter", options).value == letter
    shown = parse_answer(f"The letter on the sign is {letter}.", "letter", options).value
    assert shown == (letter if options["ABCD".index(letter)] == letter else None)


@settings(max_examples=60)
@given(
    st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="<>[]◁"), max_size=80),
    st.sampled_from("ABCD"),
)
def test_the_answer_key_of_a_json_object_decides(reasoning: str, letter: str) -> None:
    text = json.dumps({"reasoning": reasoning, "answer": letter})
    assert parse_answer(text, "letter", COLOURS).value == letter
    assert parse_answer(f"```json\n{text}\n```", "letter", COLOURS).value == letter


@given(
    st.sampled_from(["\\boxed{{{}}}", "\\boxed{{\\{size} {}}}", "\\boxed{{\\{size}{{{}}}}}",
        "\\boxed{{{{\\{size} {}}}}}",
                     "\\boxed{{\\{size}\\textbf{{{}}}}}", "\x08oxed{{{}}}"]),
    st.sampled_from(["tiny", "small", "large", "Large", "LARGE", "huge", "Huge", "displaystyle", "bf"]),
    st.sampled_from(["{}", "<answer>{}</answer>", "<answer>\n{}\n</answer>", "$${}$$",
        "<think>A</think>\n<answer>{}</answer>"]),
    st.sampled_from("ABCD"),
)  # fmt: skip
def test_a_box_is_read_in_any_size_and_in_a_tag(box: str, size: str, around: str, letter: str) -> None:
    assert parse_answer(around.format(box.format(letter, size=size)), "letter", COLOURS).value == letter


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit",
    ["(", "A", " ", "answer is ", "Answer: ", "\\boxed{", "<think>", "</think>", "the ", "A. ", "1,", "-",
        "\n", "so A",
     "<answer>", "no ", "twenty ", "一", "not ", "or B ", "*", "error ", "final answer is the ", "A) x B) ", "[", "⟦",
     "\\text{", "1/", ". A", "1.", "is it the ", '"answer": "', "if the ", "Answer: A? No. ", "정답은 ",
     "A (a) ", "wrong answer: "],
)  # fmt: skip
def test_long_repetitive_text_is_read_in_bounded_time(unit: str) -> None:
    for answer_type in ANSWER_TYPES:
        parse_answer(unit * (60_000 // len(unit)), answer_type, COLOURS)


def test_a_parsed_wrong_letter_is_final() -> None:
    result = parse_answer("Answer: D\nThe sign is red.", "letter", COLOURS)
    assert result.value == "D"
    assert not is_correct(result, "A", "letter")


@pytest.mark.parametrize(
    ("text", "gold", "answer_type", "right"),
    [
        ("B", "(b)", "letter", True),
        ("B", "B.", "letter", True),
        ("B", "C", "letter", False),
        ("Yes.", "Yes", "yes/no", True),
        ("1,200", "1200.0", "number", True),
        ("twelve", "12", "number", True),
        ("12", "13", "number", False),
        ("The Stop", "stop", "short", True),
        ("5", "five", "short", True),
        ("five dogs", "5 cats", "short", False),
        ("anything", "anything.", "free", True),
    ],
)
def test_is_correct(text: str, gold: str, answer_type: str, right: bool) -> None:
    assert is_correct(parse_answer(text, answer_type), gold, answer_type) is right


@pytest.mark.parametrize(
    ("gold", "answer_type"), [("blue", "letter"), ("", "letter"), ("maybe", "yes/no"), ("", "number")]
)
def test_a_gold_answer_of_the_wrong_type_is_an_error(gold: str, answer_type: str) -> None:
    with pytest.raises(UserError, match="Gold answer"):
        is_correct(Parsed("B", "parsed", "given"), gold, answer_type)


def test_an_unknown_answer_type_is_an_error() -> None:
    with pytest.raises(UserError, match="colour"):
        parse_answer("B", "colour")


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("Answer: D", "A"),
        ("A man stands there, so B", "A"),
        ("Based on the image, so C", "B"),
        ("Despite", "D"),
        ("An error occurred", "A"),
        ("(B)", "B"),
        ("I think (C)", "C"),
        ("the sign", None),
        ("<answer>B</answer> Answer: D", "B"),
    ],
)
def test_the_official_rule_keeps_the_published_defects(text: str, published: str | None) -> None:
    assert parse_official(text, "letter").value == published


@pytest.mark.parametrize(
    ("text", "gold", "answer_type", "right"),
    [
        ("$1,200.0$", "1200", "number", True),
        ("7.", "7", "number", True),
        ("12 cm", "12", "number", True),
        ("Answer: 7", "7", "number", False),  # with its word it is no number
        ("There are 7", "7", "number", False),
        ("exit ONLY", "Exit only", "short", True),
        ("\\text{Exit}", "exit", "short", True),
        ("Exit only.", "Exit only", "short", False),
        ("<answer> Exit </answer>", "exit", "short", True),
        ("2 hours", "2 days", "short", True),  # units are dropped, whichever they are
        ("b", "B", "letter", True),  # no capital, but the gold text as a whole
        ("b.", "B", "letter", False),
        ("9" * 5000, "9" * 5000, "number", True),
    ],
)
def test_the_official_rules_take_the_gold_text_as_a_whole(
    text: str, gold: str, answer_type: str, right: bool
) -> None:
    assert is_right(parse_official(text, answer_type), text, gold, answer_type) is right


def test_the_official_rule_for_other_types() -> None:
    assert parse_official("Answer: yes", "yes/no").state == "unparsed"  # the published code fails on it
    assert parse_official("Yes.", "yes/no").value == "yes"
    assert parse_official("Nobody", "yes/no").value == "no"
    assert parse_official("There is a door", "letter", lowercase_options=True).value == "A"
    assert parse_official("(b) closed", "letter", lowercase_options=True).value == "B"
    assert parse_official("Answer: 1,200", "number").value == "Answer: 1,200"
    with pytest.raises(UserError):
        parse_official("B", "colour")
