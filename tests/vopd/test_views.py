"""Views: student and teacher see the same question, another picture, and nothing else."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from vopd.views import VIEWS


@pytest.fixture
def row() -> dict[str, Any]:
    return {
        "id": "a",
        "image": Image.new("RGB", (40, 30), "white"),
        "crop": Image.new("RGB", (20, 10), "black"),
        "question": "Which?\nA. one\nB. two",
        "options": ["one", "two"],
        "answer": "B",
    }


def parts(messages: Any) -> tuple[Any, str]:
    assert [m["role"] for m in messages] == ["user"]
    picture, text = messages[0]["content"]
    assert (picture["type"], text["type"]) == ("image", "text")
    return picture["image"], text["text"]


def check_same_question_in_every_view(row: dict[str, Any]) -> None:
    assert {parts(VIEWS[view](row))[1] for view in ("full", "crop", "noise")} == {row["question"]}


def test_every_view_asks_the_same_question(row: dict[str, Any]) -> None:
    check_same_question_in_every_view(row)


def test_a_view_that_changes_the_question_is_seen(
    row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VIEWS, "crop", lambda r: VIEWS["full"](r | {"question": "Look: " + r["question"]}))
    with pytest.raises(AssertionError):
        check_same_question_in_every_view(row)


def test_full_shows_the_image_and_crop_the_crop(row: dict[str, Any]) -> None:
    assert parts(VIEWS["full"](row))[0] is row["image"]
    assert parts(VIEWS["crop"](row))[0] is row["crop"]


def test_noise_has_the_crops_size_and_depends_on_the_row_alone(row: dict[str, Any]) -> None:
    one, again = (parts(VIEWS["noise"](row))[0] for _ in range(2))
    other = parts(VIEWS["noise"](row | {"id": "b"}))[0]
    assert one.size == row["crop"].size
    assert one.tobytes() == again.tobytes() != other.tobytes()
    assert 30 < np.asarray(one).std() < 70


@pytest.mark.parametrize(("view", "told"), [("answer_hint", "B"), ("answer_hint_text", "two")])
def test_the_answer_is_told_in_opsds_wording_after_the_question(
    row: dict[str, Any], view: str, told: str
) -> None:
    picture, text = parts(VIEWS[view](row))
    assert picture is row["image"]
    assert text == (
        row["question"]
        + "\n\nHere is a reference solution to this problem:\n"
        + told
        + "\n\nAfter understanding "
        "the reference solution, please try to solve this problem using your own approach below:"
    )


def test_the_miniature_is_pretrained_with_the_very_words() -> None:
    from data.miniature import model
    from vopd import views

    assert model.HINTED is views.HINTED


@pytest.mark.parametrize(
    ("options", "answer", "told"),
    [(["A. one", "B. two"], "B", "two"), (["(A) one", "(B) two"], "B", "two"), ([], "yes", "yes")],
)
def test_an_options_own_letter_is_not_part_of_its_text(
    row: dict[str, Any], options: list[str], answer: str, told: str
) -> None:
    text = parts(VIEWS["answer_hint_text"](row | {"options": options, "answer": answer}))[1]
    assert f"problem:\n{told}\n\n" in text
