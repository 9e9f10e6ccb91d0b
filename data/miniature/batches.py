"""Scenes -> tensors, for pre-training, the supervised ceiling and the quick evaluation of both."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from data.miniature.fast import FastMiniature
from data.miniature.responses import RESPONSE_LIMIT, scene_response
from data.miniature.world import Scene
from vopd.evaluation.scoring import parse_answer

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """ids, labels (B, T), right-padded; `labels` holds the token that each position must predict, or -100."""

    ids: Tensor
    labels: Tensor


class Coder:
    """Text to ids in the chat format, pieces cached. tests/data checks it against the processor."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.before = self.encode("<|im_start|>user\n<|vision_start|>")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def prompt(self, question: str, image_tokens: int) -> list[int]:
        """The whole prompt with the image's placeholder repeated `image_tokens` times; 0: no image at all."""
        if image_tokens == 0:
            return self.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        rest = self.encode(f"<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n")
        return self.before + [self.image] * image_tokens + rest

    def pack(self, prompts: Sequence[list[int]], responses: Sequence[str]) -> Batch:
        """Prompts with their responses, cut at the response limit."""
        said = [[*self.encode(text), self.end][:RESPONSE_LIMIT] for text in responses]
        length = max(len(p) + len(r) for p, r in zip(prompts, said, strict=True))
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for i, (p, r) in enumerate(zip(prompts, said, strict=True)):
            ids[i, : len(p) + len(r)] = torch.tensor(p + r)
            labels[i, len(p) - 1 : len(p) + len(r) - 1] = torch.tensor(r)
        return Batch(ids, labels)

    def scenes(
        self, scenes: Sequence[Scene], view: str, questions: Sequence[str], rng: np.random.Generator
    ) -> Batch:
        tokens = len(pictures(scenes[:1], view)[0]) ** 2 // 256
        prompts = [self.prompt(q, tokens) for q in questions]
        return self.pack(prompts, [scene_response(s, rng) for s in scenes])


def pictures(scenes: Sequence[Scene], view: str) -> Tensor:
    """(B, side, side, 3) uint8: the boxed scene for view `full`, the enlarged region for `crop`."""
    return torch.from_numpy(np.stack([s.image if view == "full" else s.crop for s in scenes]))


def response_loss(
    fast: FastMiniature, batch: Batch, seen: Tensor | None, per_sequence: bool = False
) -> Tensor:
    """Mean negative log-likelihood of the response tokens, over tokens or first within each sequence."""
    side = 0 if seen is None else round(seen.shape[1] ** 0.5)
    before = 0 if seen is None else int((batch.ids[0] == fast.image_token).nonzero()[0])
    positions = fast.positions(before, side, side, batch.ids.shape[1])
    hidden = fast.hidden(fast.embed(batch.ids, seen), positions)
    kept = batch.labels != IGNORED
    logits = fast.logits(hidden[kept]).float()
    loss = torch.nn.functional.cross_entropy(logits, batch.labels[kept], reduction="none")
    if not per_sequence:
        return loss.mean()
    weight = (kept / kept.sum(1, keepdim=True))[kept]
    return (loss * weight).sum() / len(batch.ids)


def answer_all(
    fast: FastMiniature,
    coder: Coder,
    scenes: Sequence[Scene],
    view: str,
    questions: Sequence[str] | None = None,
    temperature: float = 0.0,
    chunk: int = 128,
) -> list[list[int]]:
    """Response ids to every scene, prompts of one length together."""
    questions = questions or [s.question for s in scenes]
    tokens = len(pictures(scenes[:1], view)[0]) ** 2 // 256
    prompts = [coder.prompt(q, tokens) for q in questions]
    said: dict[int, list[int]] = {}
    for length in sorted({len(p) for p in prompts}):
        group = [i for i, p in enumerate(prompts) if len(p) == length]
        for start in range(0, len(group), chunk):
            rows = group[start : start + chunk]
            images = pictures([scenes[i] for i in rows], view)
            out = fast.generate(
                [prompts[i] for i in rows], images, RESPONSE_LIMIT, coder.end, temperature, start
            )
            said.update(zip(rows, out, strict=True))
    return [said[i] for i in range(len(scenes))]


def right(coder: Coder, scenes: Sequence[Scene], said: Sequence[list[int]]) -> np.ndarray:
    """(n,) bool: correct by the project's one answer parser."""
    texts = coder.tokenizer.batch_decode(said, skip_special_tokens=True)
    found = [parse_answer(t, "letter", s.options).value for t, s in zip(texts, scenes, strict=True)]
    return np.array([value == s.answer for value, s in zip(found, scenes, strict=True)])
