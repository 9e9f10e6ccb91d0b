"""Makes the miniature's base model from random weights: `python -m data.miniature.pretrain --out DIR`.

Four stages, each of which learns one thing that the next one needs:

1. text   the language model looks a named value up among the options and says its letter, and the other way
          round, a letter that it is told (the prompt of a hinted teacher) to the named value; no image;
2. eyes   the vision tower names everything in packed scenes, and all that can be said of a crop;
3. crops  both together answer questions about crops;
4. both   crops and full scenes in turn. Most of these scenes hold few distractors: the model sees full
          images as often as crops, but seldom has to find one small thing among many. That is the weakness
          left to fix.

Every batch is a function of (seed, stage, step), so a checkpoint needs no generator state beyond those
numbers; a run that was killed resumes from its last checkpoint.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data.miniature import world
from data.miniature.batches import IGNORED, Coder, answer_all, pictures, response_loss, right
from data.miniature.fast import FastMiniature
from data.miniature.model import HINTED, build_config, build_model, build_processor, build_tokenizer, save
from data.miniature.responses import response
from data.miniature.world import Facts, Scene
from vopd.common import ownership
from vopd.common.command import reports_errors
from vopd.errors import UserError

FAMILIES = (*world.FAMILIES, world.HOLDOUT_FAMILY)
FACTS = {
    "name": world.KINDS,
    "colour": world.COLOUR_NAMES,
    "size": tuple(world.SIZES),
    "place": tuple(world.PLACES),
    "ground": tuple(world.GROUNDS),
    "tilt": tuple(world.TILTS),
}
SPARSE = (0, 6)
CROWDED_SHARE = 0.1
HINTED_SHARE = 0.2
HINTED_SHARE_OF_TALK = 0.5
LOOKUPS = 300
CROWDED = (20, 30)
PACKED = (40, 60)
MAKER = "data.miniature.pretrain"
CHECKPOINT = "pretrain.pt"
SAVE_EVERY = 100


@dataclass(frozen=True)
class Stage:
    """One stage: its batch loss as a function of the step, its length and peak learning rate."""

    name: str
    steps: int
    rate: float
    loss: Callable[[int], Tensor]


class Learner:
    """The model under training, the heads that only the `eyes` loss uses, and the stages' losses."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.tokenizer = build_tokenizer()
        self.coder = Coder(self.tokenizer)
        self.model = build_model(build_config(self.tokenizer), seed)
        self.fast = FastMiniature(self.model)
        self.cells = nn.Linear(128, len(world.KINDS) + len(world.COLOURS))
        self.boxed = nn.Linear(128, 1)
        self.facts = nn.ModuleDict({k: nn.Linear(128, len(v)) for k, v in FACTS.items()})
        self.modules = nn.ModuleDict(
            {"model": self.model, "cells": self.cells, "boxed": self.boxed, "facts": self.facts}
        )
        self.stages = (
            Stage("text", 800, 2e-3, self.text_loss),
            Stage("eyes", 600, 3e-3, self.eyes_loss),
            Stage("crops", 300, 1.5e-3, self.crops_loss),
            Stage("both", 700, 1e-3, self.both_loss),
        )

    def _rng(self, stage: int, step: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, 1000 + stage, step])

    def _scenes(self, stage: int, step: int, count: int, clutter: tuple[int, int] = CROWDED) -> list[Scene]:
        first = stage * 10_000_000 + step * 128
        return [world.scene(self.seed, "pretrain", first + i, FAMILIES, clutter) for i in range(count)]

    # ---- 1. text
    def text_loss(self, step: int) -> Tensor:
        """Several correct responses in a row after one list of options; at first only the look-up itself."""
        rng = self._rng(0, step)
        rows = [self._lookup(rng) if step < LOOKUPS or i % 4 == 0 else self._talk(rng) for i in range(32)]
        length = max(len(ids) for ids, _, _ in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        looked_up = torch.zeros_like(ids, dtype=torch.bool)
        letters = torch.tensor([self.coder.encode(f" {c}")[0] for c in "ABCD"])
        for i, (row, wanted, value) in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            labels[i, : len(wanted)] = torch.tensor(wanted)
            looked_up[i] = torch.isin(labels[i], letters) | (labels[i] == value)
        hidden = self.fast.hidden(self.fast.embed(ids, None), self.fast.positions(0, 0, 0, length))
        kept = labels != IGNORED
        loss = F.cross_entropy(self.fast.logits(hidden[kept]).float(), labels[kept], reduction="none")
        return loss.mean() + loss[looked_up[kept]].mean()

    def _lookup(self, rng: np.random.Generator) -> tuple[list[int], list[int], int]:
        """Ids, labels, and no value: all that is labelled here has been looked up."""
        values = [v for pool in world.POOLS.values() for v in pool]
        chosen = [values[i] for i in rng.permutation(len(values))[:4]]
        ids = self.coder.encode("".join(f" {c}) {v}" for c, v in zip("ABCD", chosen, strict=True)))
        labels = [IGNORED] * len(ids)
        told = rng.random() < HINTED_SHARE_OF_TALK
        for j in rng.integers(0, 4, 8):
            letter, value = "ABCD"[j], f" {chosen[j]}"
            known, sought = (f"\n{letter}\n\nIt is", value) if told else (f"{value}. Answer:", f" {letter}")
            ids += self.coder.encode(known)
            labels += [IGNORED] * (len(ids) - len(labels) - 1) + self.coder.encode(sought)
            ids += self.coder.encode(sought)
        labels += [IGNORED] * (len(ids) - len(labels))
        return ids, labels, IGNORED - 1

    def _talk(self, rng: np.random.Generator) -> tuple[list[int], list[int], int]:
        """Ids, labels, and the token of the value that a hint lets one look up (else one that never occurs)."""
        family = FAMILIES[rng.integers(len(FAMILIES))]
        pool = world.POOLS[family]
        options = tuple(pool[i] for i in rng.permutation(len(pool))[:4])
        question, spoken, value = world.question_text(family, options), rng.integers(0, 4, 3), IGNORED - 1
        if rng.random() < HINTED_SHARE_OF_TALK:
            spoken = spoken[:1]  # a second response could copy from the first
            value = self.coder.encode(f" {options[spoken[0]]}")[0]
            question = self.told(question, "ABCD"[spoken[0]], options[spoken[0]], rng)
        ids = self.coder.prompt(question, 0)
        labels = [IGNORED] * (len(ids) - 1)
        for j in spoken:
            noun = ("digit", "shape")[rng.integers(2)] if family == "colour" else family
            told = {k: v[rng.integers(len(v))] for k, v in FACTS.items()}
            told |= {"name": world.POOLS[noun][rng.integers(len(world.POOLS[noun]))]}
            told |= {"colour" if family == "colour" else "name": options[j]}
            facts = Facts(noun, **(told | ({"tilt": None} if noun == "shape" else {})))
            said = [*self.coder.encode(response(facts, family, "ABCD"[j], rng)), self.coder.end]
            ids, labels = ids + said, labels + said
        return ids, [*labels, IGNORED], value

    # ---- 2. eyes
    def eyes_loss(self, step: int) -> Tensor:
        """What is in each cell of packed scenes, which cell is boxed, and all facts of crops."""
        scenes = self._scenes(1, step, 16, PACKED)
        loss = self._cells_loss(self.fast.see(pictures(scenes, "full")), scenes)
        scenes = [*scenes, *self._scenes(1, step + 5_000, 32)]
        return loss + self._facts_loss(self.fast.see(pictures(scenes, "crop")), scenes)

    def _cells_loss(self, seen_BND: Tensor, scenes: list[Scene]) -> Tensor:
        side = world.SIDE // world.CELL
        kinds = torch.full((len(scenes), side * side), IGNORED)
        colours = kinds.clone()
        for i, s in enumerate(scenes):
            for x, y, kind, colour in s.things:
                cell = y // world.CELL * side + x // world.CELL
                kinds[i, cell], colours[i, cell] = world.KINDS.index(kind), world.COLOUR_NAMES.index(colour)
        middles = [s.things[-1] for s in scenes]
        target = torch.tensor([y // world.CELL * side + x // world.CELL for x, y, _, _ in middles])
        found = F.cross_entropy(self.boxed(seen_BND)[..., 0].float(), target)
        only = kinds != IGNORED
        guess = self.cells(seen_BND[only]).float()
        split = len(world.KINDS)
        named = F.cross_entropy(guess[:, :split], kinds[only])
        return named + F.cross_entropy(guess[:, split:], colours[only]) + 0.25 * found

    def _facts_loss(self, seen_BND: Tensor, scenes: list[Scene]) -> Tensor:
        pooled = seen_BND.mean(1)
        loss = torch.zeros(())
        for key, values in FACTS.items():
            told = [getattr(s.facts, key) for s in scenes]
            wanted = torch.tensor([IGNORED if v is None else values.index(v) for v in told])
            weight = 1.0 if key in ("name", "colour") else 0.25
            loss = loss + weight * F.cross_entropy(
                self.facts[key](pooled).float(), wanted, ignore_index=IGNORED
            )
        return loss

    # ---- 3. and 4. eyes and language together
    def crops_loss(self, step: int) -> Tensor:
        return self._answer_crops(self._scenes(2, step, 64), self._rng(2, step))

    def both_loss(self, step: int) -> Tensor:
        rng = self._rng(3, step)
        if step % 3 == 0:
            return self._answer_crops(self._scenes(3, step, 64), rng)
        clutter = CROWDED if rng.random() < CROWDED_SHARE else SPARSE
        return self._answer_scenes(self._scenes(3, step, 32, clutter), rng)

    def _asked(self, scenes: list[Scene], rng: np.random.Generator) -> list[str]:
        """The scenes' questions, some with the answer told."""
        return [
            self.told(s.question, s.answer, s.asked, rng) if rng.random() < HINTED_SHARE else s.question
            for s in scenes
        ]

    def _answer_scenes(self, scenes: list[Scene], rng: np.random.Generator) -> Tensor:
        seen = self.fast.see(pictures(scenes, "full"))
        batch = self.coder.scenes(scenes, "full", self._asked(scenes, rng), rng)
        return response_loss(self.fast, batch, seen) + 0.3 * self._cells_loss(seen, scenes)

    def _answer_crops(self, scenes: list[Scene], rng: np.random.Generator) -> Tensor:
        seen = self.fast.see(pictures(scenes, "crop"))
        batch = self.coder.scenes(scenes, "crop", self._asked(scenes, rng), rng)
        return response_loss(self.fast, batch, seen) + 0.3 * self._facts_loss(seen, scenes)

    @staticmethod
    def told(question: str, letter: str, value: str, rng: np.random.Generator) -> str:
        """The prompt of a teacher that is told the answer: mostly the letter, sometimes the option's text."""
        return HINTED.format(question=question, answer=letter if rng.random() < 0.8 else value)


def quick_check(learner: Learner, rows: int = 96) -> dict[str, float]:
    """Greedy accuracy on a few validation scenes: crop, full, few distractors, answer told."""
    crowded = [world.scene(learner.seed, "validation", i) for i in range(rows)]
    sparse = [world.scene(learner.seed, "probe", 10_000 + i, clutter=SPARSE) for i in range(rows)]
    told = [HINTED.format(question=s.question, answer=s.answer) for s in crowded]
    trials = {"crop": (crowded, "crop", None), "full": (crowded, "full", None)}
    trials |= {"sparse": (sparse, "full", None), "hinted": (crowded, "full", told)}
    return {
        name: float(right(learner.coder, s, answer_all(learner.fast, learner.coder, s, v, q)).mean())
        for name, (s, v, q) in trials.items()
    }


def _optimiser(learner: Learner) -> torch.optim.AdamW:
    weights = [p for p in learner.modules.parameters() if p.ndim >= 2]
    others = [p for p in learner.modules.parameters() if p.ndim < 2]
    groups = [{"params": weights, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.97))


def _rate(stage: Stage, step: int) -> float:
    warm = min(1.0, (step + 1) / 50)
    left = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return stage.rate * warm * (0.05 + 0.95 * left)


def _write(
    path: Path, learner: Learner, optimiser: torch.optim.AdamW, stage: int, step: int, spent: float
) -> None:
    state = {"learner": learner.modules.state_dict(), "optimiser": optimiser.state_dict()}
    state |= {"seed": learner.seed, "stage": stage, "step": step, "seconds": spent}
    with ownership.atomic(path) as partial:
        torch.save(state, partial)


def pretrain(out: Path, seed: int, threads: int) -> None:
    """Runs what is left of the four stages and saves the model's folder to `out`.

    Raises:
        UserError: `out` holds something that this command did not write there, or a checkpoint of another seed.
    """
    with ownership.held(out, MAKER, (CHECKPOINT,)) as owned:
        _pretrain(owned, seed, threads)


def _pretrain(owned: ownership.Owned, seed: int, threads: int) -> None:
    torch.set_num_threads(threads)
    learner = Learner(seed)
    optimiser = _optimiser(learner)
    checkpoint = owned.folder / CHECKPOINT
    first_stage, first_step, spent = 0, 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["seed"] != seed:
            raise UserError(
                f"{checkpoint} belongs to seed {state['seed']}: give another --out or that --seed."
            )
        learner.modules.load_state_dict(state["learner"])
        optimiser.load_state_dict(state["optimiser"])
        first_stage, first_step, spent = state["stage"], state["step"], state["seconds"]
    began = time.monotonic() - spent
    for index, stage in enumerate(learner.stages):
        if index < first_stage:
            continue
        start = first_step if index == first_stage else 0
        if start == 0:
            optimiser = _optimiser(learner)
        bar = tqdm(range(start, stage.steps), desc=stage.name, initial=start, total=stage.steps)
        for step in bar:
            for group in optimiser.param_groups:
                group["lr"] = _rate(stage, step)
            with torch.autocast("cpu", torch.bfloat16):
                loss = stage.loss(step)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(learner.modules.parameters(), 1.0)
            optimiser.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == stage.steps:
                _write(checkpoint, learner, optimiser, index, step + 1, time.monotonic() - began)
        if stage.name in ("crops", "both"):
            bar.write(
                json.dumps(
                    {"stage": stage.name, "minutes": (time.monotonic() - began) / 60} | quick_check(learner)
                )
            )
    with ownership.scratch(owned.folder) as place:
        save(learner.model, build_processor(learner.tokenizer), place)
        for file in sorted(place.iterdir()):
            with owned.writing(file.name) as partial:
                file.replace(partial)
    checkpoint.unlink()


@reports_errors("data.miniature.pretrain")
def main(arguments: list[str]) -> int:
    """Exit code 0, 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the model and of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    pretrain(args.out, args.seed, args.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
