"""The rows of one training step: their canonical order, what the method makes of them, and how they are stored.

Keys of rows are `PROMPT_ROLLOUT_TURN`; prompts count upwards, so that sorting keys is sorting the prompt stream.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import cast

import torch
import transfer_queue as tq
from transfer_queue import KVBatchMeta

from vopd.backbone import recorded_rollouts, verl_internals
from vopd.backbone.policy_gradient import advantages
from vopd.backbone.rows import Answer
from vopd.errors import UserError
from vopd.method import Method, Rollouts, calling
from vopd.method_checks import checked


def arrange(batch: KVBatchMeta, ranks: int, updates: int) -> KVBatchMeta:
    """Canonical order (prompt stream, rollout index), then equal shares per rank inside each mini-batch.

    A mini-batch holds the same rows for every number of ranks; within it, ranks get balanced token counts, and whole
    prompts where their number can be dealt out evenly: a rank then encodes each of its images once for all rollouts.
    """
    order = sorted(range(len(batch)), key=lambda i: sort_key(batch.keys[i]))
    size = len(batch) // updates
    shares: dict[int, list[int]] = defaultdict(list)
    for start in range(0, len(batch), size):
        mini = order[start : start + size]
        units = _units([batch.keys[i] for i in mini], ranks)
        lengths = [sum(batch.tags[mini[j]]["seq_len"] for j in unit) for unit in units]
        parts = verl_internals.get_seqlen_balanced_partitions(lengths, k_partitions=ranks, equal_size=True)
        for rank, part in enumerate(parts):
            shares[rank].extend(mini[j] for u in sorted(part) for j in units[u])
    batch.reorder([i for rank in range(ranks) for i in shares[rank]])
    return batch


def _units(keys: list[str], ranks: int) -> list[list[int]]:
    """Places of the rows that stay together: a prompt's, where ranks can have equally many prompts; else each row."""
    prompts: dict[str, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        prompts[sort_key(key)[0]].append(place)
    even = len({len(places) for places in prompts.values()}) == 1 and len(prompts) % ranks == 0
    return list(prompts.values()) if even else [[place] for place in range(len(keys))]


def step_rollouts(keys: list[str], records: list[Answer], limit: int) -> Rollouts:
    """A step's records as the contract's tensors; keys in canonical order."""
    correct_B = torch.tensor([bool(record["correct"]) for record in records])
    groups: dict[str, int] = {}
    return Rollouts(
        correct_B=correct_B,
        rewards_B=correct_B.to(torch.float32),
        truncated_B=torch.tensor([bool(record["truncated"]) for record in records]),
        lengths_B=torch.tensor([int(record["response_tokens"]) for record in records]),
        group_B=torch.tensor([groups.setdefault(sort_key(key)[0], len(groups)) for key in keys]),
        limit=limit,
    )


def row_fields(method: Method, rollouts: Rollouts) -> dict[str, torch.Tensor]:
    """What travels with the rows beside tokens: weights, kept, and advantages per token (jagged)."""
    lengths = rollouts.lengths_B.tolist()
    with calling(method, "prepare"):
        fields = checked(method.prepare(rollouts), len(lengths))
    if method.advantage is not None:
        if "advantages" in fields:
            raise UserError(
                f"The method names the advantage '{method.advantage}' and prepares others; drop one."
            )
        mask_BT = (torch.arange(max(lengths)) < rollouts.lengths_B[:, None]).to(torch.float32)
        fields["advantages"] = advantages(method.advantage, rollouts.rewards_B, rollouts.group_B, mask_BT)
    elif "advantages" in fields:
        fields["advantages"] = fields["advantages"][:, None].expand(-1, max(lengths))
    if "advantages" in fields:
        rows = [row_T[:length] for row_T, length in zip(fields["advantages"], lengths, strict=True)]
        fields["advantages"] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    return fields


def sort_key(key: str) -> tuple[str, int]:
    uid, session, _ = key.rsplit("_", 2)
    return uid, int(session)


def prompts_of(keys: list[str]) -> set[str]:
    """The numbers of the prompts that these rows answer."""
    return {sort_key(key)[0] for key in keys}


def store(batch: KVBatchMeta, folder: Path, step: int, seconds: float) -> None:
    """Write a step's rollouts in canonical order; `seconds` is what it took to generate them."""
    keys = sorted(batch.keys, key=sort_key)
    fields = ["record", "responses", "rollout_log_probs"]
    data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=fields)
    groups: list[recorded_rollouts.Group] = []
    columns = (data["record"], data["responses"].unbind(), data["rollout_log_probs"].unbind())
    for key, record, tokens_R, log_probs_R in zip(keys, *columns, strict=True):
        if sort_key(key)[1] == 0:
            groups.append(recorded_rollouts.Group(verl_internals.plain(record)["id"], [], []))
        groups[-1].tokens.append(tokens_R.tolist())
        groups[-1].log_probs.append(log_probs_R.tolist())
    recorded_rollouts.write(folder, step, groups, seconds)


def records_of(keys: list[str], partition_id: str) -> list[Answer]:
    """What the rollout workers wrote down of these responses."""
    data = tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=["record"])
    return [cast(Answer, dict(verl_internals.plain(record))) for record in data["record"]]
