"""What a step moves and encodes: pixels through the queue, and images by rank, each way, with the code that does it.

    python -m benchmarks.data_path [--prompts 96] [--rollouts 8] [--ranks 8] [--tokens 16384] [--seed 0]

Pictures of photographs' size, 2 to 8 megapixels (full view) and 0.05 to 1 (crop), go through the miniature's image
processor with patches of 16 pixels, as Qwen3.5 has them; responses have 50 to 1,024 tokens. No rank runs: rows are
dealt out to simulated ones. One way is float32 pixels with every rollout and rows by length alone; the last is today's.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from vopd.backbone import step_rows, verl_internals
from vopd.backbone.model_inputs import together
from vopd.backbone.pixels import VALUES, packed
from vopd.config import ROOT

MEGAPIXELS = {"full": (2.0, 8.0), "crop": (0.05, 1.0)}
GIB = 2**30


@dataclass
class Prompt:
    """One prompt's bytes both ways, and the tokens of its image in the full view."""

    floats: int
    packed: int
    tokens: int


def image_processor() -> Any:
    from transformers import AutoProcessor

    made = AutoProcessor.from_pretrained(ROOT / "data" / "miniature" / "base").image_processor
    return type(made)(
        **made.to_dict() | {"patch_size": 16, "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}}
    )


def render(processor: Any, draw: random.Random) -> Prompt:
    """Process both pictures of a prompt."""
    floats = small = tokens = 0
    for view, (least, most) in MEGAPIXELS.items():
        pixels, shape = draw.uniform(least, most) * 1e6, draw.uniform(0.6, 1.7)
        width, height = round((pixels * shape) ** 0.5), round((pixels / shape) ** 0.5)
        noise = np.random.default_rng(draw.randrange(2**32)).integers(
            0, 256, (height, width, 3), dtype=np.uint8
        )
        inputs = dict(processor(images=[Image.fromarray(noise)], return_tensors="pt"))
        floats += inputs[VALUES].nbytes
        small += sum(t.nbytes for name, t in packed(inputs, processor).items() if name != "image_grid_thw")
        if view == "full":
            tokens = len(inputs[VALUES]) // processor.merge_size**2
    return Prompt(floats, small, tokens)


def encoded(
    keys: Sequence[str], lengths: Sequence[int], ranks: int, limit: int, whole: bool
) -> tuple[int, int]:
    """Distinct prompts of the rank with the most, and encodings of full views of all ranks in one update."""
    batch = KVBatchMeta(
        keys=list(keys), tags=[{"seq_len": length} for length in lengths], partition_id="train"
    )
    length_of = dict(zip(keys, lengths, strict=True))
    with mock.patch.object(step_rows, "_units", step_rows._units if whole else _rows):
        arranged = step_rows.arrange(batch, ranks, 1).keys
    share, most, total = len(arranged) // ranks, 0, 0
    for rank in range(ranks):
        mine = arranged[rank * share : (rank + 1) * share]
        prompts = [key.split("_")[0] for key in mine]
        own = [length_of[key] for key in mine]
        size = together(prompts, own, limit) if whole else 1
        most = max(most, len(set(prompts)))
        total += sum(len({prompts[i] for i in part}) for part in micro_batches(own, limit, size))
    return most, total


def micro_batches(lengths: Sequence[int], limit: int, size: int) -> list[list[int]]:
    """The rows of each micro-batch, as verl makes them."""
    ids = torch.nested.as_nested_tensor(
        [torch.zeros(n, dtype=torch.int8) for n in lengths], layout=torch.jagged
    )
    data = TensorDict({"input_ids": ids}, batch_size=[len(lengths)])
    verl_internals.assign_non_tensor(
        data, use_dynamic_bsz=True, max_token_len_per_gpu=limit, force_group_size=size
    )
    _, rows = verl_internals.prepare_micro_batches(data=data, dp_group=None, same_micro_num_in_dp=False)
    return rows


def _rows(keys: list[str], ranks: int) -> list[list[int]]:
    return [[place] for place in range(len(keys))]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("prompts", 96), ("rollouts", 8), ("ranks", 8), ("tokens", 16384), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args(arguments)
    draw, processor = random.Random(args.seed), image_processor()
    prompts = [render(processor, draw) for _ in range(args.prompts)]
    keys = [f"{p:010d}_{r}_0" for p in range(args.prompts) for r in range(args.rollouts)]
    lengths = [
        prompt.tokens + 60 + draw.randint(50, 1024) for prompt in prompts for _ in range(args.rollouts)
    ]
    floats, small = sum(p.floats for p in prompts), sum(p.packed for p in prompts)
    print(
        f"{args.prompts} prompts x {args.rollouts}, {args.ranks} ranks, micro-batches of {args.tokens} tokens\n"
    )
    print("| | pixels stored, GiB | prompts of the fullest rank | full views encoded in an update |")
    print("|---|---|---|---|")
    for name, size, whole in (
        ("float32, with every rollout, rows by length", floats * args.rollouts, False),
        ("float32, once a prompt, rows by length", floats, False),
        ("bytes, once a prompt, whole prompts", small, True),
    ):
        most, total = encoded(keys, lengths, args.ranks, args.tokens, whole)
        print(f"| {name} | {size / GIB:.1f} | {most} | {total} |")


if __name__ == "__main__":
    main()
