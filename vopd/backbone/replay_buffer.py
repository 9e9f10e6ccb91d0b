"""verl's buffer of groups, with two additions: what it discards is counted, and nothing depends on who is first.

With filtered groups (verl's dynamic sampling) it evicts the groups whose rollouts are all correct or all incorrect,
asks for more prompts, and discards what is finished beyond the batch. Both cost generated tokens, which verl does not
count. verl looks at groups as they finish: how many more prompts are drawn, and which groups are taken, then depends on
their timing. Here it looks when all that it has asked for is finished, and takes the first groups of the prompt stream.
That costs waiting for the longest response of each refill, and makes a step the same on every machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from vopd.backbone import stop_requests, stored_views, verl_internals

METRIC = "correct"
THROWN = tuple(
    f"{what}_{why}" for why in ("evicted", "surplus") for what in ("prompts", "rollouts", "tokens")
)


class GroupBuffer(verl_internals.ReplayBuffer):
    """Counts what it discards, and decides only when all requested groups are finished.

    on_poll: called at every look, with whether a group has failed; may raise to end the wait.
    """

    on_poll: Callable[[bool], None] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.thrown: Counter[str] = Counter()

    def _sync_metadata_from_transfer_queue(self) -> None:
        """Every poll begins here; one that finds a failed group need not continue."""
        super()._sync_metadata_from_transfer_queue()
        if self.on_poll is not None:
            self.on_poll(any(self.failure_keys.values()))

    def take_thrown(self) -> dict[str, int]:
        """Prompts, rollouts and tokens discarded since the last call: evicted, and surplus of the batch."""
        taken = {name: self.thrown[name] for name in THROWN}
        self.thrown.clear()
        return taken

    def _clear_groups(self, partition_id: str, uids: set[str]) -> None:
        alike = verl_internals.verdicts_of_groups(self, partition_id)
        why = {uid: "surplus" if alike.get(uid) is None else "evicted" for uid in uids}
        self.thrown.update(f"prompts_{reason}" for reason in why.values())
        for key, tag in self.partitions[partition_id].items():
            reason = why.get(key.split("_")[0])
            if reason is not None:
                self.thrown[f"rollouts_{reason}"] += 1
                self.thrown[f"tokens_{reason}"] += tag["response_len"]
        if partition_id == "train" and uids:
            stored_views.clear(uids)
        super()._clear_groups(partition_id, uids)

    def _wait_for_next_poll(self, partition_id: str, last_debug_time: float) -> float:
        """Most of a step may be spent here, and nothing changes meanwhile: a place to answer a request to stop."""
        stop_requests.check()
        return super()._wait_for_next_poll(partition_id, last_debug_time)

    def _waits(self, partition_id: str) -> bool:
        """Whether rollouts of filtered groups are still under way."""
        under_way = self.pending_keys[partition_id] | self.running_keys[partition_id]
        return partition_id != "val" and self.filter_groups_metric is not None and bool(under_way)

    def _terminal_eviction_reasons(
        self, global_steps: int, partition_id: str
    ) -> tuple[set[str], set[str], set[str], Counter[Any]]:
        if self._waits(partition_id):
            return set(), set(), set(), Counter()
        return super()._terminal_eviction_reasons(global_steps, partition_id)

    def _sampleable_terminal_keys(self, partition_id: str, eviction_reasons: Any) -> set[str]:
        if self._waits(partition_id):
            return set()
        return super()._sampleable_terminal_keys(partition_id, eviction_reasons)

    def _select_prompt_uids(
        self, partition_id: str, sampleable_keys: set[str], batch_size: int
    ) -> tuple[list[str], dict[str, dict[str, Any]], dict[str, int]]:
        _, partition, steps = super()._select_prompt_uids(partition_id, sampleable_keys, batch_size)
        return sorted(sampleable_keys)[:batch_size], partition, steps
