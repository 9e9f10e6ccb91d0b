"""The rollout servers and who asks them: verl's, without the process that only counts requests.

verl keeps the number of requests in flight per server in a Ray actor of its own. On a small machine that actor's
imports take half a minute of one core, right before the first rollout, and most of a GiB; and every request asks it
first. Here each rollout worker counts its own requests. verl deals prompts out to workers in equal shares, so servers
are loaded evenly nevertheless.
"""

from __future__ import annotations

from typing import Any

from vopd.backbone import verl_internals


class CountingClient(verl_internals.LLMServerClient):
    """Sends a request to the server that has the fewest of this client's requests in flight."""

    def __init__(self, config: Any, servers: dict[str, Any]) -> None:
        super().__init__(config)
        self.servers = servers
        self.in_flight = dict.fromkeys(servers, 0)

    async def _acquire_server(self, request_id: str, **_extra: Any) -> tuple[str, Any]:
        name = min(self.in_flight, key=self.in_flight.__getitem__)
        self.in_flight[name] += 1
        return name, self.servers[name]

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        self.in_flight[server_id] -= 1


class ServerManager(verl_internals.LLMServerManager):
    """verl's manager of the servers, with clients that count for themselves."""

    async def _init_global_load_balancer(self) -> None:
        self.global_load_balancer = None

    def get_client(self, client_cls: Any = None, **_kwargs: Any) -> CountingClient:
        """A client of all servers, for one rollout worker or several."""
        return CountingClient(self.config, dict(zip(self.server_addresses, self.server_handles, strict=True)))
