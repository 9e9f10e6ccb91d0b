"""Rollouts on disk: what one run generated, another one (or the same one later) trains on.

One parquet file a step, `step000001.parquet`: row id, rollout index, token ids and their log-probs when they were
sampled, in canonical order; the seconds that sampling took are in the file's metadata. No pickles; a file is whole
or absent.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vopd.common import files
from vopd.errors import UserError

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("rollout", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
        ("log_probs", pa.list_(pa.float32())),
    ]
)
SECONDS = b"seconds"


@dataclass(frozen=True)
class Group:
    """All responses to one prompt, by rollout index."""

    row_id: str
    tokens: list[list[int]]
    log_probs: list[list[float]]


def path(folder: Path, step: int) -> Path:
    """The file of a step."""
    return folder / f"step{step:06d}.parquet"


def write(folder: Path, step: int, groups: list[Group], seconds: float) -> None:
    """Store a step's rollouts."""
    rows = [
        {"id": group.row_id, "rollout": i, "tokens": tokens, "log_probs": log_probs}
        for group in groups
        for i, (tokens, log_probs) in enumerate(zip(group.tokens, group.log_probs, strict=True))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata({SECONDS: str(seconds)}))
    with files.replacing(path(folder, step)) as partial:
        pq.write_table(table, partial)


def read(folder: Path, step: int) -> tuple[list[Group], float]:
    """A step's rollouts and the seconds that sampling them took.

    Raises:
        UserError: the file is missing, unreadable, or no recording.
    """
    file = path(folder, step)
    if not file.is_file():
        raise UserError(f"{file}: no such recording; record at least {step} steps (rollout.record=true).")
    try:
        table = pq.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({error}); record it again.") from error
    if table.schema.names != SCHEMA.names:
        raise UserError(f"{file}: has the columns {table.schema.names}, not {SCHEMA.names}; record it again.")
    groups: list[Group] = []
    for row in table.to_pylist():
        if row["rollout"] == 0:
            groups.append(Group(row["id"], [], []))
        if not groups or groups[-1].row_id != row["id"] or len(groups[-1].tokens) != row["rollout"]:
            raise UserError(f"{file}: rollout {row['rollout']} of row {row['id']} is out of order.")
        if not row["tokens"] or len(row["tokens"]) != len(row["log_probs"]):
            raise UserError(f"{file}: a response of row {row['id']} has {len(row['tokens'])} tokens and "
                            f"{len(row['log_probs'])} log-probs; record it again.")  # fmt: skip
        groups[-1].tokens.append(row["tokens"])
        groups[-1].log_probs.append(row["log_probs"])
    return groups, float((table.schema.metadata or {}).get(SECONDS, b"0"))


def check(folder: Path, steps: int, prompts: int, rollouts: int) -> None:
    """Refuse a folder that does not hold `steps` steps of `prompts` prompts with `rollouts` responses each."""
    for step in range(1, steps + 1):
        groups, _ = read(folder, step)
        found = {len(group.tokens) for group in groups}
        if len(groups) != prompts or found != {rollouts}:
            raise UserError(
                f"{path(folder, step)}: holds {len(groups)} prompts with {sorted(found)} responses; the run wants "
                f"{prompts} with {rollouts} (train.prompts, train.rollouts)."
            )
