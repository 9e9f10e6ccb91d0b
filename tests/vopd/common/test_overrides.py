"""Overrides: any text is applied or refused in one sentence, and nothing of the environment gets into the settings."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from vopd.common import overrides
from vopd.common.overrides import Tree
from vopd.config import FIXED, OPEN, Run, load
from vopd.errors import UserError

SETTINGS = OmegaConf.structured(Run)
SETTINGS.method = {"module": "m", "beta": 0.5}
SETTINGS.model.path = "x"
TREE = Tree(SETTINGS, OPEN, FIXED)


def refusal(*given: str) -> str:
    try:
        TREE.checked(given)
    except UserError as error:
        return str(error)
    return ""


def test_words_are_handed_on_as_they_are() -> None:
    assert TREE.checked(["train.lr=1e-5", "run_dir='a,b'", "train.betas=[0.9,0.95]"]) == [
        "train.lr=1e-5",
        "run_dir='a,b'",
        "train.betas=[0.9,0.95]",
    ]


def test_open_sections_take_new_keys_with_or_without_a_plus() -> None:
    for override in ("verl.trainer.x=1", "+verl.trainer.x=1", "++verl.trainer.x=1"):
        assert TREE.checked([override]) == ["++verl.trainer.x=1"]
    config = load("vision_opd", ["rollout.chat_template.enable_thinking=false"])
    assert config.rollout.chat_template == {"enable_thinking": False}


def test_a_text_in_quotes_may_hold_anything_printable() -> None:
    assert load("vision_opd", ["run_dir='/tmp/läufe, zwei; #3'"]).run_dir == "/tmp/läufe, zwei; #3"


def test_references_to_keys_work() -> None:
    assert load("vision_opd", ["run_dir=/x/${recipe}-${seed}", "seed=4"]).run_dir == "/x/vision_opd-4"


@pytest.mark.parametrize(
    "given",
    [
        ["train.lr=1", "train.lr=1"],
        ["train.lr=1", "train={lr: 1}"],
        ["train={lr: 1, steps: 2}", "train.steps=3"],
        ["verl.a.b=1", "verl.a={b: 2}"],
        ["verl.a=1", "verl.a.b=2"],
        ["verl.a.b=1", "++verl.a.b=2"],
    ],
)
def test_a_key_is_given_once(given: list[str]) -> None:
    assert "is given twice" in refusal(*given)


def test_keys_with_a_common_beginning_are_two() -> None:
    assert refusal("train.max_refills=1", "train.max_skipped_updates=1", "verl.a=1", "verl.ab=1") == ""


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        ("${seed}", True),
        ("a${train.lr}b${seed}", True),
        ("$seed", True),
        ("${oc.env:HOME}", False),
        ("${ oc.env:HOME }", False),
        ("${oc.env:${seed}}", False),
        ("\\${oc.env:HOME}", False),
        ("${oc.decode:1}", False),
        ("${oc.select:seed}", False),
        ("${hydra:runtime.cwd}", False),
        ("${eval_sum:1,2}", False),
        ("${", False),
    ],
)
def test_only_keys_may_be_referred_to(value: str, taken: bool) -> None:
    for content in (value, [value], {"a": {"b": value}}, {value: 1}):
        try:
            overrides.check_interpolations("here", content)
            said = ""
        except UserError as error:
            said = str(error)
        assert said.startswith("" if taken else "here: ") and bool(said) != taken


def test_pieces_that_make_a_reference_when_they_are_joined_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings are written to a file that is resolved once more when it is read."""
    monkeypatch.setenv("SECRET", "hunter2")
    pieces = [
        "logging.project='$'",
        "data.prepare='{oc.env:SECRET}'",
        "run_dir='${logging.project}${data.prepare}'",
    ]
    with pytest.raises(UserError, match="not allowed"):
        load("vision_opd", pieces)


@pytest.mark.parametrize(
    "place", ["logging: {project: '%s'}", "rollout: {chat_template: {x: '%s'}}", "verl: {x: '%s'}"]
)
def test_no_variable_gets_into_the_settings(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    recipe, profile = tmp_path / "mine.yaml", tmp_path / "own.yaml"
    own = place % "${oc.env:SECRET}" + "\n"
    recipe.write_text("method: {module: vopd.vision_opd}\n" + own)
    with pytest.raises(UserError, match=r"mine\.yaml: .*not allowed"):
        load(str(recipe), [])
    profile.write_text(own)
    with pytest.raises(UserError, match=r"own\.yaml: .*not allowed"):
        load("vision_opd", [f"profile={profile}"])


def test_the_default_run_folder_follows_its_own_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOPD_RUNS", "/elsewhere")
    assert load("vision_opd", []).run_dir == "/elsewhere/miniature/vision_opd/seed0"


@settings(max_examples=300, deadline=None)
@given(
    key=st.sampled_from(["seed", "train.lr", "run_dir", "train", "verl.x", "", "rollout.chat_template.a"]),
    value=st.text(max_size=20),
)
@example(key="run_dir", value="${a")
@example(key="seed", value="[1,")
@example(key="train", value="{lr: {a: 1}}")
def test_any_value_is_applied_or_refused_in_a_sentence(key: str, value: str) -> None:
    try:
        applied, said = TREE.checked([f"{key}={value}"]), ""
    except UserError as error:
        applied, said = [], str(error)
    assert applied in ([], [f"{key}={value}"], [f"++{key}={value}"])
    assert bool(said) != bool(applied)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=12))
def test_any_override_is_applied_or_refused_in_a_sentence(override: str) -> None:
    assert refusal(override)  # no text this short is a setting of the tree


def test_a_profile_is_named_once() -> None:
    assert overrides.profile(["a=1", "profile=p", "b=2"], "d") == ("p", ["a=1", "b=2"])
    assert overrides.profile(["a=1"], "d") == ("d", ["a=1"])
    for wrong in (["profile=p", "profile=q"], ["profile="]):
        with pytest.raises(UserError, match="profile="):
            overrides.profile(wrong, "d")
