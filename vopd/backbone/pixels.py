"""Pixels on their way to the trainer: the image's own bytes, and what the image processor makes of each of the 256.

The processor turns 8-bit pixels into float32 by one map a channel and writes a still image once for each of its frames:
eight bytes travel for one. Here the bytes travel with the map, and the numbers are made, bit for bit, where the model
reads them.

Shape suffixes: N patches, C channels, F frames of a patch, P pixels of a patch in one frame, D = C F P.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VALUES, BYTES, LEVELS = "pixel_values", "pixel_bytes", "pixel_levels"


def packed(inputs: dict[str, Tensor], image_processor: Any) -> dict[str, Tensor]:
    """`inputs` with pixel bytes (N, C, P) and their levels (C, F, 256) in the place of `pixel_values` (N, D).

    As they are where this would not give the same numbers again: no image, a moving one, values that are not the
    processor's map of bytes.
    """
    if VALUES not in inputs or not hasattr(image_processor, "rescale_and_normalize"):
        return inputs
    values_ND, frames = inputs[VALUES], int(image_processor.temporal_patch_size)
    levels_CF256 = _levels(image_processor, frames)
    first_NCP = values_ND.unflatten(1, (len(levels_CF256), frames, -1))[:, :, 0]
    low_C, high_C = levels_CF256[:, 0, :1], levels_CF256[:, 0, -1:]
    bytes_NCP = ((first_NCP - low_C) / (high_C - low_C) * 255).round().clamp(0, 255).to(torch.uint8)
    rest = {name: value for name, value in inputs.items() if name != VALUES}
    candidate = {**rest, BYTES: bytes_NCP, LEVELS: levels_CF256}
    return candidate if torch.equal(unpacked(candidate)[VALUES], values_ND) else inputs


def unpacked(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Counterpart of `packed`: with `pixel_values` (N, D)."""
    if BYTES not in inputs:
        return inputs
    bytes_NCP, levels_CF256 = inputs[BYTES], inputs[LEVELS]
    values_NCFP = levels_CF256.new_empty(*bytes_NCP.shape[:2], levels_CF256.shape[1], bytes_NCP.shape[2])
    for c, levels_F256 in enumerate(levels_CF256):
        index_NP = bytes_NCP[:, c].int()
        for f, levels_256 in enumerate(levels_F256):
            values_NCFP[:, c, f] = levels_256[index_NP]
    rest = {name: value for name, value in inputs.items() if name not in (BYTES, LEVELS)}
    return {**rest, VALUES: values_NCFP.flatten(1)}


def _levels(image_processor: Any, frames: int) -> Tensor:
    """What the processor makes of each byte, (C, F, 256)."""
    channels = len(image_processor.image_mean)
    ramp = torch.arange(256, dtype=torch.uint8).expand(1, channels, 1, 256)
    levels: Tensor = image_processor.rescale_and_normalize(
        ramp,
        image_processor.do_rescale,
        image_processor.rescale_factor,
        image_processor.do_normalize,
        image_processor.image_mean,
        image_processor.image_std,
    )
    return levels[0].expand(channels, frames, 256).contiguous()
