"""The rendered views of a step's prompts on their way to the trainer: once a prompt, not once a rollout.

They are most of what travels: an image's pixels are as large as thousands of tokens. They lie in a partition of the
TransferQueue of their own, under the prompt's number, until the update that reads them is done.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import transfer_queue as tq

from vopd.backbone import verl_internals
from vopd.backbone.rows import RenderedView

PARTITION = "views"


async def put(uid: str, views: dict[str, RenderedView]) -> None:
    """Store a prompt's views, by name."""
    fields = verl_internals.list_of_dict_to_tensordict([{"rendered": views}])
    await tq.async_kv_batch_put(keys=[uid], fields=fields, tags=[{}], partition_id=PARTITION)


def of_rows(uids: list[str]) -> list[dict[str, RenderedView]]:
    """The views of each row's prompt; rows of one prompt share them."""
    distinct = list(dict.fromkeys(uids))
    data = tq.kv_batch_get(keys=distinct, partition_id=PARTITION, select_fields=["rendered"])
    found = {
        uid: cast("dict[str, RenderedView]", verl_internals.plain(views))
        for uid, views in zip(distinct, data["rendered"], strict=True)
    }
    return [found[uid] for uid in uids]


def clear(uids: Iterable[str]) -> None:
    """Forget the views of these prompts."""
    tq.kv_clear(keys=sorted(uids), partition_id=PARTITION)
