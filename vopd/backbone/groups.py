"""verl's buffer of groups, with two additions: what it throws away is counted, and which groups win is fixed.

With filtered groups (verl's dynamic sampling) it evicts the groups whose rollouts are all right or all wrong, asks for
more prompts, and discards what is finished beyond the batch. Both cost generated tokens, which verl does not count;
and it chooses among finished groups in no fixed order. Here the first ones of the prompt stream are chosen.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from vopd.backbone import seams

METRIC = "correct"
THROWN = tuple(
    f"{what}_{why}" for why in ("evicted", "surplus") for what in ("prompts", "rollouts", "tokens")
)


class GroupBuffer(seams.ReplayBuffer):
    """See the module's docstring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.thrown: Counter[str] = Counter()

    def take_thrown(self) -> dict[str, int]:
        """Prompts, rollouts and tokens thrown away since the last call: evicted, and surplus of the batch."""
        taken = {name: self.thrown[name] for name in THROWN}
        self.thrown.clear()
        return taken

    def _clear_groups(self, partition_id: str, uids: set[str]) -> None:
        alike = seams.verdicts_of_groups(self, partition_id)
        why = {uid: "surplus" if alike.get(uid) is None else "evicted" for uid in uids}
        self.thrown.update(f"prompts_{reason}" for reason in why.values())
        for key, tag in self.partitions[partition_id].items():
            reason = why.get(key.split("_")[0])
            if reason is not None:
                self.thrown[f"rollouts_{reason}"] += 1
                self.thrown[f"tokens_{reason}"] += tag["response_len"]
        super()._clear_groups(partition_id, uids)

    def _select_prompt_uids(
        self, partition_id: str, sampleable_keys: set[str], batch_size: int
    ) -> tuple[list[str], dict[str, dict[str, Any]], dict[str, int]]:
        _, partition, steps = super()._select_prompt_uids(partition_id, sampleable_keys, batch_size)
        return sorted(sampleable_keys)[:batch_size], partition, steps
