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
    }


def parts(messages: Any) -> tuple[Any, str]:
    assert [m["role"] for m in messages] == ["user"]
    picture, text = messages[0]["content"]
    assert (picture["type"], text["type"]) == ("image", "text")
    return picture["image"], text["text"]


def check_same_question_in_every_view(row: dict[str, Any]) -> None:
    assert {parts(view(row))[1] for view in VIEWS.values()} == {row["question"]}


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
