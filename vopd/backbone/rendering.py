"""From chat messages to model inputs: token ids, pixels and 3-D rotary positions, once per triplet and view.

Every view of every policy goes through `render`, so student and teacher share template, processor and image
resizing, and the prompt ids that vLLM samples from are the ids the trainer scores.

Shape suffixes: P prompt tokens, R response tokens, L = P + R.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from vopd.backbone import pixels
from vopd.backbone.rows import RenderedView
from vopd.common import control_tokens
from vopd.errors import UserError
from vopd.views import Messages

ROWS_OF_POSITIONS = (
    4  # text, then the three mrope axes (time, height, width): verl's layout for Qwen VL models
)


@dataclass(frozen=True)
class Rendered:
    """One prompt as the model sees it.

    Attributes:
        key: equal for prompts with equal images; the n rollouts of a prompt share one encoding of them.
        prompt_ids_P: token ids, image placeholders expanded.
        position_ids_4P: rotary positions of the prompt.
        multi_modal_inputs: pixels, image_grid_thw, ... as the processor made them, packed (`pixels`).
        images: the images in the order of their placeholders, for vLLM.
    """

    key: str
    prompt_ids_P: torch.Tensor
    position_ids_4P: torch.Tensor
    multi_modal_inputs: dict[str, torch.Tensor]
    images: list[Image.Image]

    def for_training(self) -> RenderedView:
        """What travels to the workers (images stay behind)."""
        return {
            "key": self.key,
            "prompt_ids": self.prompt_ids_P,
            "position_ids": self.position_ids_4P,
            "multi_modal_inputs": self.multi_modal_inputs,
        }


def render(processor: Any, messages: Messages, row_id: str, limit: int, template: dict[str, Any]) -> Rendered:
    """Tokenise one view of one triplet.

    Args:
        processor: HF processor with verl's `get_rope_index` bound to it (`verl.utils.tokenizer.hf_processor`).
        limit: most prompt tokens allowed. A longer prompt is an error, never cut.
        template: extra arguments of the chat template, e.g. `enable_thinking`.

    Raises:
        UserError: the prompt is longer than `limit`; names the row.
    """
    text = control_tokens.prompt(processor, messages, template)
    images = [part["image"] for m in messages for part in m["content"] if part["type"] == "image"]
    inputs = dict(processor(text=[text], images=images or None, return_tensors="pt"))
    ids_1P, mask_1P = inputs.pop("input_ids"), inputs.pop("attention_mask")
    inputs.pop("mm_token_type_ids", None)
    if ids_1P.shape[1] > limit:
        raise UserError(
            f"Row {row_id}: its prompt has {ids_1P.shape[1]} tokens, the limit is {limit}; raise "
            "rollout.max_prompt_tokens or drop the row."
        )
    positions_4P = _positions(processor, ids_1P, mask_1P, inputs)
    inputs = pixels.packed(inputs, getattr(processor, "image_processor", None))
    content = b"".join(inputs[name].numpy().tobytes() for name in sorted(inputs))
    key = hashlib.blake2b(content, digest_size=16).hexdigest()
    return Rendered(key, ids_1P[0], positions_4P, inputs, images)


def _positions(
    processor: Any, ids_1P: torch.Tensor, mask_1P: torch.Tensor, inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    text_1P = torch.arange(ids_1P.shape[1])[None]
    types_1P = torch.zeros_like(ids_1P)
    types_1P[ids_1P == processor.image_token_id] = 1
    vision_31P, _ = processor.get_rope_index(
        input_ids=ids_1P,
        attention_mask=mask_1P,
        image_grid_thw=inputs.get("image_grid_thw"),
        video_grid_thw=None,
        mm_token_type_ids=types_1P,
    )
    return torch.cat([text_1P, vision_31P[:, 0]])


def with_response(rendered: RenderedView, response_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (L,) and positions (4, L) of prompt + response.

    The response is text, so each of its positions follows the last one by one on all axes; the text row counts
    tokens. The prompt is this view's own: positions of another view's image would be wrong.
    """
    prompt_P, position_4P = rendered["prompt_ids"], rendered["position_ids"]
    steps_R = torch.arange(1, response_R.shape[0] + 1)
    start = torch.cat([position_4P[:1, -1], position_4P[1:].max().repeat(ROWS_OF_POSITIONS - 1)])
    return torch.cat([prompt_P, response_R]), torch.cat([position_4P, start[:, None] + steps_R], dim=1)
