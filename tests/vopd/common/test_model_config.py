"""What a model's config.json says that a run must fit."""

import json
from pathlib import Path

import pytest

from vopd.common import model_config
from vopd.errors import UserError
from vopd.method import build

BASE = Path(__file__).parents[3] / "data" / "miniature" / "base"
FACTS = {"vocab_size": 100, "max_position_embeddings": 50, "num_attention_heads": 4}


def test_the_language_models_part_is_read(tmp_path: Path) -> None:
    assert model_config.read(str(BASE))["vocab_size"] == 1024
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 5, "text_config": {"vocab_size": 7}}))
    assert model_config.read(str(tmp_path))["vocab_size"] == 7


@pytest.mark.parametrize("content", [None, "{", "[]", "null", '{"text_config": 3}'])
def test_what_cannot_be_read_is_named(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: not readable"):
        model_config.read(str(tmp_path))


@pytest.mark.parametrize("name", ["no/such/folder", "nobody/nothing", "/gone"])
def test_a_name_that_leads_nowhere_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"model.path={name}: no such folder, and not available from the hub"):
        model_config.read(name)


@pytest.mark.parametrize(
    ("vocabulary", "tokens", "parallel", "sentence"),
    [
        (100, 50, 4, ""),
        (101, 50, 4, "vocabulary has 100 entries, and the method needs 101"),
        (1, 51, 4, "takes 50 tokens"),
        (1, 50, 3, "4 attention heads"),
    ],
)
def test_a_run_must_fit(vocabulary: int, tokens: int, parallel: int, sentence: str) -> None:
    try:
        model_config.check(FACTS, "m", vocabulary, tokens, parallel)
        said = ""
    except UserError as error:
        said = str(error)
    assert bool(said) == bool(sentence) and sentence in said


def test_what_a_model_does_not_state_is_not_judged() -> None:
    model_config.check({"vocab_size": None, "num_attention_heads": "four"}, "m", 10**9, 10**9, 7)


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"module": "vopd.vision_opd", "top_k": 7}, 7),
        ({"module": "baselines.opsd", "top_k": 9}, 9),
        ({"module": "baselines.opsd", "top_k": None, "clip": 0.05}, 1),
        ({"module": "baselines.grpo"}, 1),
    ],
)
def test_methods_say_what_vocabulary_they_need(settings: dict[str, object], needed: int) -> None:
    assert build(settings).least_vocabulary == needed
