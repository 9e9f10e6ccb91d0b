"""Whatever a text holds, its prompt has the control tokens of the same prompt with an innocent text, at every door."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from transformers import AutoProcessor

from data import schema
from data.synthesis import prompts
from data.synthesis.client import Client, Request
from data.synthesis.config import Server
from vopd.common import control_tokens
from vopd.config import ROOT
from vopd.errors import UserError
from vopd.evaluation.endpoint import Endpoint, Sampling
from vopd.prompt_lengths import prompt_lengths
from vopd.views import VIEWS

BASE = ROOT / "data" / "miniature" / "base"
# The added tokens of Qwen3.5's tokenizer, as public code lists them.
QWEN = """
<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|>
<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <|fim_prefix|> <|fim_middle|>
<|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <|audio_start|> <|audio_end|> <|audio_pad|> <tts_pad>
<tts_text_bos> <tts_text_eod> <tts_text_bos_single> <tool_call> </tool_call> <tool_response> </tool_response> <think>
</think>
""".split()
MARKERS = ["<image>", "<video>", "<|placeholder|>", "<##IMAGE##>"]
OWN = [
    "[INST]",
    "<s>",
    "aba",
    "ab c",
]  # of another family; the last two overlap with themselves and hold a space
PICTURE = Image.new("RGB", (32, 32), "red")


def processor_with(added: list[str]) -> Any:
    processor = AutoProcessor.from_pretrained(BASE)
    processor.tokenizer.add_tokens(added, special_tokens=True)
    return processor


MINIATURE, FAMILY, OTHER = (processor_with(added) for added in ([], QWEN, [*QWEN, *OWN]))
pieces = st.lists(
    st.one_of(
        st.sampled_from([*QWEN, *MARKERS]),
        st.sampled_from(
            ["<", "|>", "<|", "<|im_", "end|>", " ", "\n", "</", "think", "ab", "a", "{question}"]
        ),
        st.text(max_size=5),
    ),
    max_size=8,
)
hostile = pieces.map("".join)


def row(text: str) -> dict[str, Any]:
    return {
        "id": "a",
        "image": PICTURE,
        "crop": PICTURE,
        "question": text,
        "answer": "A",
        "options": [text, text],
    }


def prompt(processor: Any, view: str, text: str) -> str:
    return control_tokens.prompt(processor, VIEWS[view](row(text)), {})


def controls(processor: Any, text: str) -> list[int]:
    """The control tokens of a prompt, pictures put in, in their order."""
    ids = processor(text=[text], images=[PICTURE], return_tensors="pt")["input_ids"][0].tolist()
    special = set(processor.tokenizer.added_tokens_decoder)
    return [i for i in ids if i in special]


@pytest.mark.parametrize("processor", [MINIATURE, FAMILY], ids=["miniature", "qwen"])
@pytest.mark.parametrize("view", ["full", "answer_hint_text"])
@settings(max_examples=50)
@given(text=hostile)
@example(text="".join(QWEN) + "".join(MARKERS))
@example(text="<|im_<|im_end|>end|>")
def test_a_prompt_has_the_control_tokens_of_an_innocent_one(processor: Any, view: str, text: str) -> None:
    innocent = controls(processor, prompt(processor, view, "What is it?"))
    assert controls(processor, prompt(processor, view, text)) == innocent
    assert not any(marker in prompt(processor, view, text) for marker in MARKERS)


@given(text=st.one_of(hostile, st.text("abc <s>[INST]")))
@example(text="ababa")
def test_special_tokens_of_any_tokenizer(text: str) -> None:
    innocent = controls(OTHER, prompt(OTHER, "full", "What is it?"))
    assert controls(OTHER, prompt(OTHER, "full", text)) == innocent


@pytest.mark.parametrize("token", QWEN)
def test_twin_without_the_rule_a_control_token_is_seen(token: str) -> None:
    special = set(FAMILY.tokenizer.added_tokens_decoder)
    counts = []
    for question in ("What is it?", f"What {token}?"):
        text = FAMILY.apply_chat_template(VIEWS["full"](row(question)), tokenize=False)
        counts.append(sum(i in special for i in FAMILY.tokenizer(text).input_ids))
    assert counts[1] == counts[0] + 1


@given(text=hostile)
def test_what_is_counted_is_what_is_rendered(text: str) -> None:
    shown = MINIATURE(text=[prompt(MINIATURE, "full", text)], images=[PICTURE])["input_ids"][0]
    assert prompt_lengths([row(text)], MINIATURE, "full", {}) == [len(shown)]


@given(text=st.text())
def test_an_innocent_text_stays_as_it_is(text: str) -> None:
    tokens = control_tokens.pattern()
    assert tokens.search(text) or control_tokens.escape(text, tokens) == text
    assert control_tokens.escape("a < b | c > d <b>[x]</b> <|>", tokens) == "a < b | c > d <b>[x]</b> <|>"


@given(text=hostile)
def test_letters_are_kept_and_twice_is_once(text: str) -> None:
    tokens = control_tokens.pattern(OTHER.tokenizer)
    once = control_tokens.escape(text, tokens)
    assert once.replace(" ", "") == text.replace(" ", "") and control_tokens.escape(once, tokens) == once


def test_a_token_that_cannot_be_split_is_refused() -> None:
    added = {
        0: SimpleNamespace(content="\ue000", special=True),
        1: SimpleNamespace(content="<b>", special=False),
    }
    tokens = control_tokens.pattern(SimpleNamespace(added_tokens_decoder=added))
    assert control_tokens.escape("a <b>", tokens) == "a <b>"
    with pytest.raises(UserError, match="cannot be split"):
        control_tokens.escape("a \ue000", tokens)


# ---- through servers, whose tokenizers find special tokens in a text ------------------------------------------------


def sent_texts(messages: Any) -> str:
    return "".join(part["text"] for m in messages for part in m["content"] if part["type"] == "text")


def png() -> bytes:
    return bytes(schema.encode(PICTURE)["bytes"])


@given(text=hostile)
def test_a_question_of_an_evaluation(text: str) -> None:
    endpoint = Endpoint("http://localhost:1/v1", "m", Sampling(False, 0.0, 1.0, 8, 0), 1.0)
    body, _ = endpoint.request("q", "full", png(), text)
    assert not control_tokens.pattern().search(sent_texts(body["messages"]))


def test_special_tokens_of_the_evaluated_model() -> None:
    tokens = control_tokens.pattern(OTHER.tokenizer)
    endpoint = Endpoint("http://localhost:1/v1", "m", Sampling(False, 0.0, 1.0, 8, 0), 1.0, tokens=tokens)
    body, _ = endpoint.request("q", "full", png(), "[INST] <s>What?")
    assert sent_texts(body["messages"]) == "[ INST] < s>What?"


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photograph") / "a.png"
    file.write_bytes(png())
    return file


@given(text=hostile)
def test_a_text_that_a_model_proposed(photograph: Path, text: str) -> None:
    client = Client(OmegaConf.structured(Server(base_url="http://localhost:1/v1", model="m")), 0)
    body: Any = client._body(Request("a", photograph, prompts.options(text, text), 0.0))
    assert not control_tokens.pattern().search(sent_texts(body["messages"]))
