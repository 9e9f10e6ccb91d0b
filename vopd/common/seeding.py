"""One rule for every random choice made while sampling: a seed per request, from what the request is.

verl gives vLLM no seed per request, and its `full_determinism` gives every request the same one, so that the n
rollouts of a prompt coincide. Here a request's seed depends on run seed, step, row and rollout index alone: not on
the order of arrival, the number of workers or a resume.
"""

import hashlib


def request_seed(run_seed: int, step: int, row_id: str, rollout: int) -> int:
    """A 31-bit seed; equal arguments give equal seeds on every machine."""
    key = f"{run_seed}/{step}/{row_id}/{rollout}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") & 0x7FFFFFFF
