"""Can labels close the gap? `python -m data.miniature.ceiling` -> data/miniature/ceiling.json.

Right responses, full view, the same budget as the default post-training run (64 updates of 128 rows,
training split). If this supervised run did not raise full-view accuracy, the gap would be the
architecture's and no post-training method could be judged on it.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.miniature import world
from data.miniature.batches import pictures, response_loss
from data.miniature.measure import accuracies, load
from data.miniature.prepare import ROWS
from vopd.common import ownership
from vopd.common.command import reports_errors
from vopd.errors import UserError

BASE = Path(__file__).parent / "base"
UPDATES = 64
ROWS_PER_UPDATE = 128
PART = 32


def ceiling(folder: Path, seed: int, rate: float) -> dict:
    """Trains in memory and returns accuracies before and after, and the share of the gap that was closed."""
    fast, coder = load(folder)
    test = [world.scene(0, "test", i) for i in range(ROWS["test"])]
    holdout = [world.scene(0, "holdout", i, (world.HOLDOUT_FAMILY,)) for i in range(ROWS["holdout"])]
    before = accuracies(fast, coder, test, holdout)
    rng = np.random.default_rng([seed, 77])
    order = np.concatenate([rng.permutation(ROWS["train"]) for _ in range(3)])
    optimiser = torch.optim.AdamW(fast.model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    for update in tqdm(range(UPDATES), desc="supervised ceiling"):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (update + 1) / 5) * 0.5 * (1 + math.cos(math.pi * update / UPDATES))
        rows = order[update * ROWS_PER_UPDATE : (update + 1) * ROWS_PER_UPDATE]
        for part in np.split(rows, ROWS_PER_UPDATE // PART):
            scenes = [world.scene(0, "train", int(i)) for i in part]
            with torch.autocast("cpu", torch.bfloat16):
                batch = coder.scenes(scenes, "full", [s.question for s in scenes], rng)
                loss = response_loss(fast, batch, fast.see(pictures(scenes, "full")), per_sequence=True)
            (loss * PART / ROWS_PER_UPDATE).backward()
        torch.nn.utils.clip_grad_norm_(fast.model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    after = accuracies(fast, coder, test, holdout)
    closed = (after["full"]["accuracy"] - before["full"]["accuracy"]) / before["gap"]
    settings = {"updates": UPDATES, "rows_per_update": ROWS_PER_UPDATE, "rate": rate, "seed": seed}
    return {"settings": settings, "before": before, "after": after, "share_of_gap_closed": closed}


def check_place(out: Path) -> None:
    """`UserError` unless `out` is free, or holds a result of this command."""
    if not os.path.lexists(out):
        return
    try:
        there = json.loads(out.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        there = None
    if not isinstance(there, dict) or set(there) != {"settings", "before", "after", "share_of_gap_closed"}:
        raise UserError(f"{out}: is not a result of data.miniature.ceiling; give another --out.")


@reports_errors("data.miniature.ceiling")
def main(arguments: list[str]) -> int:
    """Exit code 0, 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=BASE)
    parser.add_argument("--out", type=Path, default=BASE.parent / "ceiling.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    check_place(args.out)
    result = ceiling(args.model, args.seed, args.rate)
    with ownership.atomic(args.out) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
