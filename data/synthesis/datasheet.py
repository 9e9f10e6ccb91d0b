"""The datasheet of a synthesised set: what went in, what each stage left out and why, what it cost, how it was made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data.synthesis.journal import Journal
from vopd.common.markdown import escaped, fenced
from vopd.common.ownership import Owned

MILLION = 1e6


@dataclass
class Stage:
    """What the datasheet says of a stage."""

    name: str
    taken: int
    journal: Journal
    unanswered: list[str] = field(default_factory=list)


def write(owned: Owned, config: DictConfig, stages: list[Stage], rows: list[dict[str, Any]]) -> None:
    """Write datasheet.md into the synthesis's folder."""
    answers = Counter(row["answer"] for row in rows)
    families = Counter(row["family"] for row in rows)
    source, model = escaped(config.source), escaped(config.server.model)
    small = escaped(config.difficulty.model or "none, so nothing was filtered by difficulty")
    text = f"""# {source}, synthesised

{len(rows)} rows in `train.parquet`, made by `vopd data synthesize` from the images of {source}.

- **Licence of the images:** {escaped(config.licence)}. Questions, answers and options come from {model}; its
  licence may bind their use.
- **Method:** after ZwZ (arXiv 2602.11858). Regions by {escaped(_proposer(config))}.
- **Small model of the difficulty filter:** {small}.
- **Correct letters:** {_counts(answers)}.
- **Families:** {_counts(families)}.
- **Known problems:** answers are what one model agrees with itself on, not what is true. The set was not compared with
  any benchmark: `vopd data audit` does that.

## Stages

An item is an image up to `filter`, whose reasons count regions, then a region, from `validate` on a question, and in
`answer` and `difficulty` one sample of one.

| stage | in | out | rejected, by reason | unanswered | tokens in | tokens out | cost |
|---|---|---|---|---|---|---|---|
{chr(10).join(_line(stage, config) for stage in stages)}

## Settings

{fenced(OmegaConf.to_yaml(config).rstrip(), "yaml")}
"""
    owned.write_text("datasheet.md", text)


def _proposer(config: DictConfig) -> str:
    detector = config.propose.detector
    return f"{config.propose.proposer} {detector}".strip()


def _counts(counter: Counter[str]) -> str:
    return ", ".join(escaped(f"{key} {count}") for key, count in sorted(counter.items())) or "none"


def _line(stage: Stage, config: DictConfig) -> str:
    records = list(stage.journal.records.values())
    reasons = Counter(r["reason"] for r in records if r["reason"] is not None)
    accepted = len(records) - reasons.total()
    for record in records:
        reasons.update(record.get("against", {}))
    tokens = [sum(r.get("tokens", (0, 0))[side] for r in records) for side in (0, 1)]
    # The small model of the difficulty filter has a price of its own, which is not asked for.
    priced = stage.name != "difficulty"
    cost = (
        (tokens[0] * config.server.price_in + tokens[1] * config.server.price_out) / MILLION
        if priced
        else 0.0
    )
    cells = [
        stage.name,
        stage.taken,
        accepted,
        _counts(reasons),
        len(stage.unanswered),
        *tokens,
        f"{cost:.4f}",
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
