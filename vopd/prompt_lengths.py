"""How many tokens the prompts of triplets take in each view, found without their pixels; too long a one is refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any

from vopd.common import control_tokens
from vopd.errors import UserError
from vopd.views import VIEWS


def check_prompt_lengths(
    rows: Iterable[Mapping[str, Any]],
    processor: Any,
    limit: int,
    views: Sequence[str] = ("full", "crop"),
    template: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Refuse the first row whose prompt, in any of `views`, takes more than `limit` tokens; never truncate.

    Rows, processor and template as in `prompt_lengths`.
    """
    for batch in _batches(rows, 256):
        for view in views:
            lengths = prompt_lengths(batch, processor, view, template)
            for row, length in zip(batch, lengths, strict=True):
                if length > limit:
                    raise UserError(
                        f"row {row['id']}: its prompt takes {length} tokens in the {view} view "
                        f"and the limit is {limit}; raise rollout.max_prompt_tokens or leave the row out."
                    )


def prompt_lengths(
    rows: Sequence[Mapping[str, Any]], processor: Any, view: str, template: Mapping[str, Any]
) -> list[int]:
    """Tokens of every row's prompt in a view, as the rollout will make it.

    rows: their images may be `schema.Outline`s, for an image counts as the tokens the processor will put in its place,
    found from its size without its pixels. processor: a Hugging Face processor with a chat template. template: extra
    arguments of that template, e.g. `enable_thinking`.
    """
    texts, images = [], []
    for row in rows:
        messages = VIEWS[view](row)
        texts.append(control_tokens.prompt(processor, messages, template))
        images.append([part["image"] for m in messages for part in m["content"] if part["type"] == "image"])
    sizes = [[image.height, image.width] for of_row in images for image in of_row]
    counts = iter(
        processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"] if sizes else []
    )
    # The template writes one placeholder an image, which the text's own count already holds.
    return [
        len(ids) + sum(next(counts) - 1 for _ in of_row)
        for ids, of_row in zip(processor.tokenizer(texts)["input_ids"], images, strict=True)
    ]


def _batches(rows: Iterable[Mapping[str, Any]], size: int) -> Iterator[list[Mapping[str, Any]]]:
    rest = iter(rows)
    while batch := list(islice(rest, size)):
        yield batch
