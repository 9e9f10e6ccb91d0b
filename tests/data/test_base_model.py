"""The shipped base folder: sizes, tokens, processor, and the fast CPU path against the library's forward."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from data.miniature import world
from data.miniature.batches import Coder, answer_all, pictures
from data.miniature.fast import FastMiniature, delta_step, gated_delta_rule
from data.miniature.model import HINTED, SPECIALS, build_config, build_tokenizer
from data.miniature.responses import RESPONSE_LIMIT, scene_response

BASE = Path(world.__file__).parent / "base"
VIEWS = {"full": 64, "crop": 9}


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32).eval()


def rows(count: int) -> list[world.Scene]:
    return [world.scene(0, "test", i) for i in range(count)]


def picture(scene: world.Scene, view: str) -> Image.Image:
    return Image.fromarray(scene.image if view == "full" else scene.crop)


def ask(processor, scenes: list[world.Scene], view: str, **kwargs):
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": s.question}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for s in scenes
    ]
    return processor(
        text=texts,
        images=[picture(s, view) for s in scenes],
        return_tensors="pt",
        padding=True,
        **kwargs,
    )


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    files = {p.name: p.stat().st_size for p in BASE.iterdir()}
    assert files["model.safetensors"] <= 8 * 2**20
    assert not [f for f in files if f.endswith((".bin", ".pt", ".pth", ".pkl", ".partial", ".py"))]
    assert {"README.md", "config.json", "tokenizer.json", "processor_config.json"} <= set(files)


def test_vocabulary_equals_tokenizer(processor, model) -> None:
    tokenizer = processor.tokenizer
    assert len(tokenizer) == model.config.text_config.vocab_size == model.lm_head.weight.shape[0] >= 1000
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1
    assert all(len(tokenizer(s).input_ids) == 1 for s in SPECIALS)


@pytest.mark.parametrize("letter", "ABCD")
def test_answer_letters_are_single_tokens(processor, letter: str) -> None:
    tokenizer = processor.tokenizer
    assert len(tokenizer(letter).input_ids) == 1 and len(tokenizer(f" {letter}").input_ids) == 1
    assert tokenizer(f"It is red. Answer: {letter}").input_ids[-1] == tokenizer(f" {letter}").input_ids[0]


@pytest.mark.parametrize("text", ["Ünïcode ✓", "a  b\n\n c", "What digit is in the red box? A) 6"])
def test_any_text_survives_the_tokenizer(processor, text: str) -> None:
    assert processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text


def test_tokenizer_can_be_rebuilt_from_the_code(processor) -> None:
    assert build_tokenizer().get_vocab() == processor.tokenizer.get_vocab()


def test_configuration_is_the_codes(processor, model) -> None:
    text = build_config(processor.tokenizer).text_config
    for key in ("layer_types", "rope_parameters", "head_dim", "hidden_size", "vocab_size"):
        assert getattr(text, key) == getattr(model.config.text_config, key)
    assert text.rope_parameters["partial_rotary_factor"] == 0.25
    assert sum(text.rope_parameters["mrope_section"]) == text.head_dim * 0.25 / 2


@pytest.mark.parametrize(("view", "tokens"), VIEWS.items())
def test_processor_and_coder_write_the_same_prompt(processor, view: str, tokens: int) -> None:
    coder = Coder(processor.tokenizer)
    for s in rows(3):
        ids = ask(processor, [s], view)["input_ids"][0].tolist()
        assert ids.count(coder.image) == tokens
        assert ids == coder.prompt(s.question, tokens)


def test_chat_template_takes_strings_and_parts(processor) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    string = [{"role": "user", "content": "Hi"}]
    shown = processor.apply_chat_template(parts, tokenize=False)
    assert (
        shown == processor.apply_chat_template(string, tokenize=False) == "<|im_start|>user\nHi<|im_end|>\n"
    )
    assert processor.tokenizer.apply_chat_template(string, tokenize=False) == shown


def test_prompts_are_short(processor) -> None:
    coder = Coder(processor.tokenizer)
    told = [HINTED.format(question=s.question, answer=s.answer) for s in rows(20)]
    assert max(len(coder.prompt(q, 64)) for q in told) <= 160


@pytest.mark.parametrize("view", VIEWS)
def test_fast_forward_is_the_librarys(processor, model, view: str) -> None:
    scenes = rows(3)
    inputs = ask(processor, scenes, view, padding_side="right")
    fast = FastMiniature(model)
    side, ids = int(VIEWS[view] ** 0.5), inputs["input_ids"]
    before = int((ids[0] == fast.image_token).nonzero()[0])
    with torch.no_grad():
        wanted = model(**inputs).logits
        seen = fast.see(pictures(scenes, view))
        got = fast.logits(
            fast.hidden(fast.embed(ids, seen), fast.positions(before, side, side, ids.shape[1]))
        )
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], wanted[real], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("view", VIEWS)
def test_fast_generation_is_the_librarys(processor, model, view: str) -> None:
    scenes, coder = rows(4), Coder(processor.tokenizer)
    mine = answer_all(FastMiniature(model), coder, scenes, view)
    for s, said in zip(scenes, mine, strict=True):
        inputs = ask(processor, [s], view)
        out = model.generate(**inputs, max_new_tokens=RESPONSE_LIMIT, do_sample=False)
        assert out[0, inputs["input_ids"].shape[1] :].tolist() == said


def test_chunked_rule_is_the_recurrence() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 70, 3, 8) for _ in range(3))
    g, beta = -torch.rand(2, 70, 3), torch.rand(2, 70, 3)
    out, last = gated_delta_rule(q, k, v, g, beta)
    state, each = torch.zeros(2, 3, 8, 8), []
    for t in range(70):
        o, state = delta_step(*(x[:, t : t + 1] for x in (q, k, v, g, beta)), state)
        each.append(o)
    torch.testing.assert_close(out, torch.cat(each, 1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(last, state, atol=1e-5, rtol=1e-4)


def test_labels_stand_one_position_before_their_tokens(processor) -> None:
    coder = Coder(processor.tokenizer)
    batch = coder.pack(
        [coder.prompt("Hi", 0), coder.prompt("What is it?", 0)], ["Upright.", "It is blue. Answer: B"]
    )
    for ids, labels in zip(batch.ids.tolist(), batch.labels.tolist(), strict=True):
        kept = [i for i, label in enumerate(labels) if label >= 0]
        assert [labels[i] for i in kept] == [ids[i + 1] for i in kept]
        assert labels[kept[-1]] == coder.end


def test_gold_responses_have_a_spread_of_lengths(processor) -> None:
    rng = np.random.default_rng(0)
    lengths = [len(processor.tokenizer(scene_response(s, rng)).input_ids) + 1 for s in rows(300)]
    low, median, high = np.percentile(lengths, [10, 50, 90])
    assert median >= 12 and high - low >= 10
    assert 0.01 <= np.mean(np.array(lengths) > RESPONSE_LIMIT) <= 0.1
