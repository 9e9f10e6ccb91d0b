"""Near-duplicate pairs against a comparison of all with all; hashes of re-encoded, resized and other images."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data import near_duplicates
from data.miniature import world

hashes = st.lists(st.integers(0, 2**64 - 1), max_size=30)
flips = st.lists(st.tuples(st.integers(0, 29), st.lists(st.integers(0, 63), max_size=8)), max_size=12)


def linked(pairs: set[tuple[int, int]], count: int) -> list[int]:
    """Lowest number each is linked to, by repeated relabelling."""
    label = list(range(count))
    for _ in range(count):
        for i, j in pairs:
            label[i] = label[j] = min(label[i], label[j])
    return label


@given(hashes, flips, st.integers(0, 8))
def test_pairs_and_groups_are_those_of_all_with_all(base: list[int], changed: list, distance: int) -> None:
    values = list(base)
    for source, bits in changed:
        if base:
            value = base[source % len(base)]
            for bit in bits:
                value ^= 1 << bit
            values.append(value)
    array = np.array(values, dtype=np.uint64)
    near = {
        (i, j): (values[i] ^ values[j]).bit_count()
        for i in range(len(values))
        for j in range(i + 1, len(values))
        if (values[i] ^ values[j]).bit_count() <= distance
    }
    found = list(near_duplicates.near_pairs(array, distance))
    assert len({(i, j) for i, j, _ in found}) == len(found)
    assert all(near[i, j] == bits for i, j, bits in found)
    assert near_duplicates.groups(array, distance).tolist() == linked(set(near), len(values))


def test_copies_make_few_pairs() -> None:
    assert len(list(near_duplicates.near_pairs(np.zeros(1000, dtype=np.uint64)))) == 999


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("index", range(6))
def test_a_re_encoding_is_near_and_another_scene_is_not(index: int) -> None:
    def hash_of(picture: Image.Image) -> int:
        return near_duplicates.perceptual_hash(picture)

    picture = Image.fromarray(world.scene(0, "train", index).image).resize(
        (900, 700), Image.Resampling.BICUBIC
    )
    own = hash_of(picture)
    for copy in (jpeg(picture, 60), picture.resize((450, 350)), jpeg(picture.resize((1500, 1100)), 80)):
        assert (own ^ hash_of(copy)).bit_count() <= near_duplicates.DISTANCE
    other = hash_of(Image.fromarray(world.scene(0, "train", index + 6).image).resize((900, 700)))
    assert (own ^ other).bit_count() > 2 * near_duplicates.DISTANCE
