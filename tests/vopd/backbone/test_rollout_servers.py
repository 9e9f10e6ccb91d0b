"""Requests go where the fewest of the worker's own are in flight."""

import asyncio

from vopd.backbone.rollout_servers import CountingClient, ServerManager


def test_a_request_goes_to_the_least_loaded_server() -> None:
    client = CountingClient({}, {"a": "handle a", "b": "handle b"})

    async def take() -> tuple[str, str]:
        return await client._acquire_server("request", prompt_ids=[1])

    assert [asyncio.run(take()) for _ in range(3)] == [
        ("a", "handle a"),
        ("b", "handle b"),
        ("a", "handle a"),
    ]
    client._release_server("a")
    client._release_server("a")
    assert asyncio.run(take())[0] == "a"
    assert client.in_flight == {"a": 1, "b": 1}


def test_clients_of_a_manager_know_all_servers_and_count_apart() -> None:
    manager = ServerManager.__new__(ServerManager)
    manager.config, manager.server_addresses, manager.server_handles = {}, ["a", "b"], [1, 2]
    first, second = manager.get_client(), manager.get_client()
    asyncio.run(first._acquire_server("request"))
    assert first.servers == {"a": 1, "b": 2}
    assert (first.in_flight["a"], second.in_flight["a"]) == (1, 0)
