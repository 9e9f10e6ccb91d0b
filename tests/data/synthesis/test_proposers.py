"""Proposers: what stands out is found, boxes stay inside, the same picture gives the same regions."""

from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from data.synthesis import proposers
from vopd.errors import UserError


def overlap(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Intersection over union."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, width) * max(0, height)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


@pytest.mark.parametrize("scale", [1, 3])  # the second is larger than the working size
def test_things_of_another_colour_are_found_first(scale: int) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(90, 130, (300 * scale, 400 * scale, 3), np.uint8))
    things = [(40, 50, 90, 110), (250, 30, 320, 75), (180, 200, 240, 260)]
    things = [tuple(v * scale for v in thing) for thing in things]
    for thing, colour in zip(things, [(220, 30, 30), (30, 60, 220), (240, 230, 40)], strict=True):
        ImageDraw.Draw(image).rectangle((thing[0], thing[1], thing[2] - 1, thing[3] - 1), fill=colour)
    best = [region.box for region in proposers.opencv(image, [])[:8]]
    assert all(max(overlap(box, thing) for box in best) > 0.7 for thing in things)


def test_a_blank_picture_has_no_region() -> None:
    assert proposers.opencv(Image.new("RGB", (200, 100), (120, 130, 140)), []) == []


@settings(max_examples=15)
@given(width=st.integers(1, 300), height=st.integers(1, 300), seed=st.integers(0, 99))
def test_regions_are_inside_scored_and_repeatable(width: int, height: int, seed: int) -> None:
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)
    regions = proposers.opencv(image, [])
    assert regions == proposers.opencv(image, [])
    assert [r.score for r in regions] == sorted((r.score for r in regions), reverse=True)
    for region in regions:
        x0, y0, x1, y1 = region.box
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height and 0 < region.score <= 1


def test_a_photograph_has_regions_of_use() -> None:
    with Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png") as image:
        regions = proposers.opencv(image, [])
    patch = (133, 345, 210, 415)  # the mission patch on her sleeve
    assert max(overlap(r.box, patch) for r in regions if r.score >= 0.75) > 0.6


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real OWL-ViT with random weights, a few thousand of them, that is sure of everything it sees."""
    folder = tmp_path_factory.mktemp("detector")
    letters = "abcdefghijklmnopqrstuvwxyz"
    signs = ["!", "<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {sign: number for number, sign in enumerate(signs)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16, pad_token="!")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # a query that opens with 0 is ignored
    torch.manual_seed(0)
    model = transformers.OwlViTForObjectDetection(
        transformers.OwlViTConfig(
            text_config={**size, **ends, "vocab_size": len(signs), "max_position_embeddings": 16},
            vision_config={**size, "image_size": 64, "patch_size": 16},
            projection_dim=16,
        )
    )
    # A score is sigmoid((cosine + shift) * scale): above one half with this shift, whatever it sees.
    head = model.class_head
    for layer, bias in ((head.logit_shift, 2.0), (head.logit_scale, 0.0)):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, bias)
    torch.nn.init.zeros_(model.box_head.dense2.weight)  # random ones give boxes without width
    model.save_pretrained(folder)
    side = {"height": 64, "width": 64}
    images = transformers.OwlViTImageProcessor(size=side, crop_size=side)
    transformers.OwlViTProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_a_real_detector_gives_regions_inside_the_picture(detector: Path) -> None:
    proposer = proposers.build("zero_shot_detection", str(detector))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8))
    assert proposer.needs_labels and proposer.propose(image, []) == []
    regions = proposer.propose(image, ["sign", "cup"])
    assert len(regions) >= 4 and {region.label for region in regions} <= {"sign", "cup"}
    assert [r.score for r in regions] == sorted((r.score for r in regions), reverse=True)
    for region in regions:
        x0, y0, x1, y1 = region.box
        assert 0 <= x0 < x1 <= 200 and 0 <= y0 < y1 <= 150 and 0 < region.score <= 1


def test_a_detector_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"propose\.detector="):
        proposers.build("zero_shot_detection", str(tmp_path))
