"""Measures a miniature checkpoint: `python -m data.miniature.measure --model data/miniature/base`.

Greedy accuracy on the test split (and the held-out letters) per view and family, the hinted prompt's
accuracy, and what responses look like at temperature 1. Used for the model card and by the supervised
ceiling.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from statsmodels.stats.proportion import proportion_confint
from transformers import AutoTokenizer, Qwen3_5ForConditionalGeneration

from data.miniature import world
from data.miniature.batches import Coder, answer_all, right
from data.miniature.fast import FastMiniature
from data.miniature.model import HINTED
from data.miniature.prepare import ROWS
from data.miniature.responses import RESPONSE_LIMIT
from data.miniature.world import Scene
from vopd.common.command import reports_errors


def load(folder: Path) -> tuple[FastMiniature, Coder]:
    """The checkpoint in float32 and its coder."""
    model = Qwen3_5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return FastMiniature(model), Coder(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))


def share(hits: np.ndarray) -> dict[str, float | int]:
    """Share of correct rows with its 95% Wilson interval."""
    low, high = proportion_confint(int(hits.sum()), len(hits), method="wilson")
    return {"accuracy": float(hits.mean()), "low": float(low), "high": float(high), "rows": len(hits)}


def accuracies(fast: FastMiniature, coder: Coder, test: Sequence[Scene], holdout: Sequence[Scene]) -> dict:
    """Greedy: test full and crop, in all and by family; held-out letters in both views."""
    result: dict = {}
    for view in ("full", "crop"):
        hits = right(coder, test, answer_all(fast, coder, test, view))
        result[view] = share(hits)
        for family in world.FAMILIES:
            result[f"{view}/{family}"] = share(hits[[s.family == family for s in test]])
        result[f"{view}/holdout"] = share(right(coder, holdout, answer_all(fast, coder, holdout, view)))
    result["gap"] = result["crop"]["accuracy"] - result["full"]["accuracy"]
    return result


def sampled(fast: FastMiniature, coder: Coder, scenes: Sequence[Scene], view: str) -> dict:
    """Responses at temperature 1: accuracy, length quantiles, shares cut at the limit and distinct."""
    said = answer_all(fast, coder, scenes, view, temperature=1.0)
    cut = np.array([coder.end not in ids for ids in said])
    quantiles = np.percentile([len(ids) for ids in said], [5, 25, 50, 75, 95])
    return {
        "right": share(right(coder, scenes, said)),
        "tokens_5_25_50_75_95": [float(q) for q in quantiles],
        "cut_at_limit": share(cut),
        "limit": RESPONSE_LIMIT,
        "distinct": len({tuple(ids) for ids in said}) / len(said),
    }


def measure(folder: Path, seed: int = 0) -> dict:
    """All of the card's figures."""
    fast, coder = load(folder)
    test = [world.scene(seed, "test", i) for i in range(ROWS["test"])]
    holdout = [world.scene(seed, "holdout", i, (world.HOLDOUT_FAMILY,)) for i in range(ROWS["holdout"])]
    result = accuracies(fast, coder, test, holdout)
    for key in ("answer", "asked"):
        told = [HINTED.format(question=s.question, answer=getattr(s, key)) for s in test]
        result[f"hinted/{key}"] = share(right(coder, test, answer_all(fast, coder, test, "full", told)))
    result["sampled"] = {view: sampled(fast, coder, test, view) for view in ("full", "crop")}
    return result


@reports_errors("data.miniature.measure")
def main(arguments: list[str]) -> int:
    """Exit code 0, 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "base")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    print(json.dumps(measure(args.model), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
