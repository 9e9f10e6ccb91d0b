"""Pixels travel as bytes and come back bit for bit, or travel as they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor

from vopd.backbone.pixels import BYTES, VALUES, packed, unpacked
from vopd.config import ROOT


@pytest.fixture(scope="module")
def image_processor() -> Any:
    return AutoProcessor.from_pretrained(ROOT / "data" / "miniature" / "base").image_processor


def processed(image_processor: Any, width: int, height: int, seed: int) -> dict[str, torch.Tensor]:
    made = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return dict(image_processor(images=[Image.fromarray(made)], return_tensors="pt"))


@given(st.integers(40, 90), st.integers(40, 90), st.integers(0, 2**16))
def test_bytes_become_the_same_numbers(image_processor: Any, width: int, height: int, seed: int) -> None:
    inputs = processed(image_processor, width, height, seed)
    travelling = packed(inputs, image_processor)
    assert VALUES not in travelling
    back = unpacked(travelling)
    assert back.keys() == inputs.keys()
    assert all(torch.equal(back[name], value) for name, value in inputs.items())


def test_an_eighth_travels(image_processor: Any) -> None:
    inputs = processed(image_processor, 128, 128, 0)
    travelling = packed(inputs, image_processor)
    assert travelling[BYTES].nbytes * 8 == inputs[VALUES].nbytes


def test_channels_with_maps_of_their_own(image_processor: Any) -> None:
    other = type(image_processor)(
        **image_processor.to_dict() | {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    )
    inputs = processed(other, 64, 64, 1)
    assert torch.equal(unpacked(packed(inputs, other))[VALUES], inputs[VALUES])
    assert BYTES in packed(inputs, other)


def test_other_numbers_travel_as_they_are(image_processor: Any) -> None:
    inputs = processed(image_processor, 64, 64, 2)
    between = inputs | {VALUES: inputs[VALUES] + 1e-4}
    moving = inputs | {VALUES: inputs[VALUES] * torch.linspace(0, 1, inputs[VALUES].shape[1])}
    for odd in (between, moving):
        assert packed(odd, image_processor) is odd
        assert unpacked(odd) is odd


def test_no_image_and_an_unknown_processor_are_left_alone(image_processor: Any) -> None:
    assert packed({}, image_processor) == {}
    inputs = processed(image_processor, 64, 64, 3)
    assert packed(inputs, SimpleNamespace(temporal_patch_size=2)) is inputs
