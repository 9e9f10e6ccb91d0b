"""Whether a policy has collapsed, judged from the numbers of one step. Flags are recorded; nothing is stopped.

The paper's unregularised teacher is the reason: its student's answers run to the length limit and say nothing. A flag
says that a number has left the range of a healthy run, not why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

TRUNCATED_SHARE = 0.5
ENTROPY_NATS = 0.01
DIVERGENCE_FACTOR = 10.0
FLAGS = ("length", "entropy", "divergence", "loss")


def collapse_flags(line: Mapping[str, float], first: Mapping[str, float]) -> dict[str, bool]:
    """The flags of one step.

    Args:
        line: numbers of the step: `truncated` (share of responses without an end of their own), `entropy` (nats per
            token), and, for methods that have one, `divergence`.
        first: the same numbers of the run's first step.

    Returns:
        `length`: at least half of the responses reach the limit. `entropy`: below 0.01 nats, where the first step
        was not, or not finite. `divergence`: more than ten times the first step's, or not finite, in the first step
        too. `loss`: not finite.
    """
    divergence, start = line.get("divergence"), first.get("divergence")
    exploded = divergence is not None and not math.isfinite(divergence)
    if divergence is not None and start is not None and math.isfinite(start):
        exploded = not divergence <= DIVERGENCE_FACTOR * max(start, 1e-3)
    return {
        "length": line["truncated"] >= TRUNCATED_SHARE,
        "entropy": line["entropy"] < ENTROPY_NATS <= first["entropy"] or not math.isfinite(line["entropy"]),
        "divergence": exploded,
        "loss": not math.isfinite(line.get("loss", 0.0)),
    }
