"""Made-up run folders with a known effect: the base model's verdicts are fixed by a hash, a method fixes a share of
the wrong full-view answers and breaks a share of the right ones, by a generator seeded with recipe and seed."""

import json
import random
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vopd.evaluation.records import Record, write_records
from vopd.report.run_summary import summarise

SPLITS = {"test": 160, "holdout": 60}
RIGHT = {"full": 0.6, "crop": 0.94}
Question = tuple[str, str, str]
"""Split, id, family."""


def questions(splits: Mapping[str, int] = SPLITS) -> list[Question]:
    """Ids as the miniature has them."""
    families = {"holdout": ("letter",)}
    return [
        (split, f"{split}-0-{i:06d}", (f := families.get(split, ("digit", "shape", "colour")))[i % len(f)])
        for split, count in splits.items()
        for i in range(count)
    ]


def chance(*parts: object) -> random.Random:
    """A generator that depends on the parts alone."""
    return random.Random(zlib.crc32(repr(parts).encode()))


def record(question: Question, view: str, correct: bool, says: str, tokens: int = 12) -> Record:
    split, name, family = question
    parsed = "A" if correct else "B"
    return Record(
        name, family, view, split, f"What is in the red box of {name}? A) this B) that", f"{says}. Answer: {parsed}",
        tokens, False, parsed, "A", correct,
    )  # fmt: skip


def answers(
    asked: Sequence[Question], who: tuple[object, ...], fixed: float, broken: float, says: str = "I see"
) -> list[Record]:
    """Full and crop answers (full alone on held-out questions); `who` seeds what the method changes."""
    found = []
    for question in asked:
        for view in ("full", "crop") if question[0] != "holdout" else ("full",):
            right = chance("base", view, question[1]).random() < RIGHT[view]
            luck = chance(*who, view, question[1]).random()
            changed = view == "full" and luck < (broken if right else fixed)
            found.append(record(question, view, right != changed, says))
    return found


def settings(recipe: str, seed: int, kind: str, changed: Mapping[str, Any]) -> dict[str, Any]:
    """What a run records of its settings, as far as a comparison reads it; `changed` by dotted key."""
    config = OmegaConf.create(
        {
            "seed": seed,
            "run_dir": f"/nowhere/runs/{recipe}/seed{seed}",
            "recipe": recipe,
            "recipe_folder": str(Path("/nowhere/recipes") / kind),
            "profile": "miniature",
            "export": "bfloat16",
            "method": {"module": f"methods.{recipe}"},
            "model": {"path": "/nowhere/data/miniature/base"},
            "data": {"folder": "/nowhere/.cache/miniature", "prepare": None},
            "train": {"steps": 8, "prompts": 4, "rollouts": 2, "updates_per_batch": 1, "lr": 3e-5, "warmup_steps": 1},
            "rollout": {
                "temperature": 1.0, "top_p": 1.0, "max_prompt_tokens": 160, "max_response_tokens": 40,
                "chat_template": {},
            },
        }
    )  # fmt: skip
    for key, value in changed.items():
        OmegaConf.update(config, key, value)
    return OmegaConf.to_container(config)  # type: ignore[return-value]


def make_run(
    folder: Path,
    recipe: str = "alpha",
    seed: int = 0,
    *,
    fixed: float = 0.0,
    broken: float = 0.0,
    kind: str = "",
    tokens: int = 100,
    validated: Sequence[int] = (3, 6),
    asked: Sequence[Question] | None = None,
    changed: Mapping[str, Any] | None = None,
    **facts: Any,
) -> Path:
    """One finished run folder. tokens: generated in each of 8 updates; validated: steps with validation answers;
    changed: settings by dotted key; facts: of summary.json's "run"."""
    asked = questions() if asked is None else asked
    run = folder / kind / recipe / f"seed{seed}"
    write_records(run / "records" / "before.jsonl", answers(asked, ("none",), 0, 0))
    write_records(
        run / "records" / "after.jsonl", answers(asked, (recipe, seed), fixed, broken, f"{recipe} sees")
    )
    for step in validated:
        part = [("validation", f"validation-0-{i:06d}", "digit") for i in range(40)]
        write_records(
            run / "records" / f"step{step}.jsonl",
            answers(part, (recipe, seed), fixed * step / 8, broken * step / 8),
        )
    lines = [
        {
            "step": step, "loss": 1 / step, "divergence": 0.1 / step, "entropy": 0.4, "response_length": 10 + step,
            "rollout_accuracy": 0.5 + fixed * step / 16, "prompts": 4, "rollouts": 8, "tokens_generated": tokens,
            "scorer_tokens": 300, "seconds/step": 2.0, "seconds/gen": 0.5,
        }
        for step in range(1, 9)
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "evaluations.jsonl").write_text('{"name": "before", "step": 0}\n')
    known: dict[str, Any] = {
        "recipe": recipe,
        "profile": "miniature",
        "seed": seed,
        "code": "0" * 40,
        "code_hash": "c0de",
        "machine": "Abacus, 2 cores",
        "data_hash": "da7a",
        "model_hash": "ba5e",
        "scorer": {"rule": "strict", "judge": "none", "code": "9a65e4"},
        "method": {
            "anchor": f"anchor of {recipe}", "objective": "any", "normalisation": "per token", "clip": "none",
        },
        "settings": settings(recipe, seed, kind, changed or {}),
        "wall_seconds": 60.0 + seed,
        "peak_memory_gib": 9.5,
    }  # fmt: skip
    summarise(run, known | facts)
    return run
