"""Near-duplicate images by perceptual hash: a 64-bit pHash an image, and the pairs that differ in few bits.

A pHash survives re-encoding and resizing (Zauner, 2010). Pairs are found by bands: of two hashes that differ in at most
d bits, cut into d + 1 bands, one band is equal, so only hashes that share a band are compared. Memory is linear in the
number of images; only the time within a band's bucket is quadratic.
"""

from collections.abc import Iterator
from itertools import pairwise

import imagehash
import numpy as np
from PIL import Image

BITS = 64
DISTANCE = 4
_SIDE = 128  # imagehash shrinks further, to 32 x 32


def perceptual_hash(picture: Image.Image) -> int:
    """64-bit pHash of an image, as an unsigned number. Large images are shrunk by whole factors first (faster)."""
    factor = max(1, min(picture.size) // _SIDE)
    small = picture.convert("L").reduce(factor) if factor > 1 else picture
    bits = imagehash.phash(small).hash.flatten()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_pairs(hashes_N: np.ndarray, distance: int = DISTANCE) -> Iterator[tuple[int, int, int]]:
    """Pairs (i, j, bits that differ), i < j, at most `distance` bits apart, each once, in no particular order.

    Of equal hashes only neighbours in order are paired, which links them all: n copies make n - 1 pairs. A pair of
    different hashes is given between the first image of either.
    """
    unique_U, first_U, inverse_N = np.unique(
        hashes_N.astype(np.uint64), return_index=True, return_inverse=True
    )
    last = first_U.copy()
    for i, u in enumerate(inverse_N.tolist()):
        if i != last[u]:
            yield int(last[u]), i, 0
            last[u] = i
    bands_BU = _bands(unique_U, distance + 1)
    for band, values_U in enumerate(bands_BU):
        order_U = np.argsort(values_U, kind="stable")
        for bucket in np.split(order_U, np.flatnonzero(np.diff(values_U[order_U])) + 1):
            yield from _within(bucket, unique_U, bands_BU[:band], first_U, distance)


def _bands(hashes_U: np.ndarray, count: int) -> list[np.ndarray]:
    edges = np.linspace(0, BITS, count + 1).astype(int)
    return [
        (hashes_U >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        for low, high in pairwise(edges.tolist())
    ]


def _within(
    bucket: np.ndarray, hashes_U: np.ndarray, earlier: list[np.ndarray], first_U: np.ndarray, distance: int
) -> Iterator[tuple[int, int, int]]:
    """Near pairs in one bucket, but for those that an earlier band has found: one row of the table at a time."""
    for place, u in enumerate(bucket[:-1]):
        others = bucket[place + 1 :]
        apart = np.bitwise_count(hashes_U[others] ^ hashes_U[u])
        near = apart <= distance
        for band_U in earlier:
            near &= band_U[others] != band_U[u]
        for other, bits in zip(others[near].tolist(), apart[near].tolist(), strict=True):
            i, j = sorted((int(first_U[u]), int(first_U[other])))
            yield i, j, int(bits)


def groups(hashes_N: np.ndarray, distance: int = DISTANCE) -> np.ndarray:
    """For each image the lowest number among the images it is linked to by near pairs: equal = one group."""
    parent_N = np.arange(len(hashes_N))

    def root(i: int) -> int:
        while parent_N[i] != i:
            parent_N[i] = parent_N[parent_N[i]]
            i = int(parent_N[i])
        return i

    for i, j, _ in near_pairs(hashes_N, distance):
        low, high = sorted((root(i), root(j)))
        parent_N[high] = low
    return np.array([root(i) for i in range(len(hashes_N))], dtype=np.int64)
