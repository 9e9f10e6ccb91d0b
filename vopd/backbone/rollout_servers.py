"""The rollout servers and who asks them: verl's, without the process that only counts requests.

verl keeps the number of requests in flight per server in a Ray actor of its own. On a small machine that actor's
imports take half a minute of one core, right before the first rollout, and most of a GiB; and every request asks it
first. Here each rollout worker counts its own requests. verl deals prompts out to workers in equal shares, so servers
are loaded evenly nevertheless. The rollouts of a prompt go to one server, which processes and encodes its image once.
"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from vopd.backbone import verl_internals


def request_id(prompt: str) -> str:
    """An id for one more request of this prompt."""
    return f"{prompt}/{uuid4().hex}"


def _prompt(request_id: str) -> str:
    return request_id.rpartition("/")[0] or request_id


class CountingClient(verl_internals.LLMServerClient):
    """Sends a prompt's requests to the server that has the fewest of this client's requests in flight at the first."""

    def __init__(self, config: Any, servers: dict[str, Any]) -> None:
        super().__init__(config)
        self.servers = servers
        self.in_flight = dict.fromkeys(servers, 0)
        self.at: dict[
            str, tuple[str, int]
        ] = {}  # a prompt with requests in flight -> its server, and how many

    async def _acquire_server(self, request_id: str, **_extra: Any) -> tuple[str, Any]:
        prompt = _prompt(request_id)
        name, others = self.at.get(prompt) or (min(self.in_flight, key=self.in_flight.__getitem__), 0)
        self.at[prompt] = name, others + 1
        self.in_flight[name] += 1
        return name, self.servers[name]

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        assert request_id is not None  # verl gives it
        self.in_flight[server_id] -= 1
        prompt = _prompt(request_id)
        name, others = self.at.pop(prompt)
        if others > 1:
            self.at[prompt] = name, others - 1


class ServerManager(verl_internals.LLMServerManager):
    """verl's manager of the servers, with clients that count for themselves."""

    async def _init_global_load_balancer(self) -> None:
        self.global_load_balancer = None

    def get_client(self, client_cls: Any = None, **_kwargs: Any) -> CountingClient:
        """A client of all servers, for one rollout worker or several."""
        return CountingClient(self.config, dict(zip(self.server_addresses, self.server_handles, strict=True)))
