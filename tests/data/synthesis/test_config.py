"""Settings: the paper's figures are the defaults, unknown keys and wrong values are sentences."""

from pathlib import Path

import pytest

from data.synthesis import config
from vopd.errors import UserError

NEEDED = ["images=a", "out=b", "source=s", "licence=l", "server.model=m"]


def test_the_papers_figures_are_the_defaults() -> None:
    c = config.load(NEEDED)
    assert (c.filter.min_score, c.filter.max_area, c.filter.min_width, c.filter.min_height) == (
        0.75,
        0.1,
        1200,
        1200,
    )
    assert (c.crop.enlarge, c.crop.jpeg_quality) == (2, 95)
    assert (c.ask.questions, c.ask.temperature, c.ask.top_p) == (3, 0.9, 0.8)
    assert (c.answer.samples, c.answer.temperature, c.answer.consensus) == (8, 0.7, 0.75)
    assert (c.box.expand, c.box.width) == (0.05, 5)
    assert (c.difficulty.samples, c.difficulty.drop_at) == (4, 2)


def test_overrides_win_over_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 3\nanswer:\n  samples: 6\n")
    c = config.load([str(file), *NEEDED, "seed=4"])
    assert (c.seed, c.answer.samples) == (4, 6)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("answer.sample=3", "sample"),
        ("seed=many", "many"),
        ("resume", "'resume' is not a setting"),
        ("answer.consensus=75", "answer.consensus=75"),
        ("server.concurrency=0", "server.concurrency=0 is not allowed; give a number of at least 1 "),
        ("propose.proposer=sam", "sam is unknown"),
        ("propose.proposer=zero_shot_detection", "propose.detector has no value"),
        ("server.model=???", "'server.model' has no value"),
        ("seed=1.5", "seed"),
        ("seed=-1", "seed=-1 is not allowed"),
        ("server.model=''", "server.model is empty"),
        ("answer.temperature=nan", "answer.temperature=nan is not allowed"),
        ("server.timeout_s=.inf", "could not be converted to Float"),
        ("ask.top_p=0", "ask.top_p=0.0 is not allowed; give a number of more than 0"),
        ("crop.enlarge=1000", "crop.enlarge=1000 is not allowed"),
        ("server.tries=true", "server.tries"),
        ("ask={questions: 3", "put such a value in quotes"),
        ("3]", "'3]' is not a setting"),
        ("=3", "write key=value without spaces"),
    ],
)
def test_a_bad_override_is_refused(override: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        config.load([*(given for given in NEEDED if given.split("=")[0] != override.split("=")[0]), override])


def test_a_key_given_twice_is_a_sentence() -> None:
    with pytest.raises(UserError, match="seed is given twice"):
        config.load([*NEEDED, "seed=1", "seed=2"])


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "answer: 3", "seed: &a [*a]", "seed: ${nothing}"])
def test_a_wrong_file_is_a_sentence(tmp_path: Path, content: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(UserError):
        config.load([str(file), *NEEDED])


def test_only_what_changes_results_is_a_difference() -> None:
    first, second = (
        config.load(NEEDED),
        config.load(["images=a", "out=c", *NEEDED[2:], "server.concurrency=1", "server.timeout_s=9"]),
    )
    assert config.differences(first, second) == []
    third = config.load([*NEEDED, "ask.top_p=1.0", "seed=1"])
    assert config.differences(first, third) == ["ask.top_p", "seed"]
