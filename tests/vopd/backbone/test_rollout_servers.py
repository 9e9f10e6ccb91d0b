"""Requests go where the fewest of the worker's own are in flight."""

import asyncio

from vopd.backbone.rollout_servers import CountingClient, ServerManager, request_id


def taken(client: CountingClient, name: str) -> str:
    return asyncio.run(client._acquire_server(name, prompt_ids=[1]))[0]


def test_a_prompt_goes_to_the_least_loaded_server() -> None:
    client = CountingClient({}, {"a": "handle a", "b": "handle b"})
    assert asyncio.run(client._acquire_server("1/x"))[1] == "handle a"
    assert [taken(client, f"{prompt}/x") for prompt in (2, 3)] == ["b", "a"]
    client._release_server("a", "1/x")
    client._release_server("a", "3/x")
    assert taken(client, "4/x") == "a"
    assert client.in_flight == {"a": 1, "b": 1}


def test_rollouts_of_a_prompt_go_to_one_server() -> None:
    client = CountingClient({}, {"a": 1, "b": 2})
    names = [request_id(prompt) for prompt in ("1", "2") for _ in range(4)]
    assert len(set(names)) == 8
    assert [taken(client, name) for name in names] == ["a"] * 4 + ["b"] * 4
    for name in names:
        client._release_server("a" if name.startswith("1/") else "b", name)
    assert client.in_flight == {"a": 0, "b": 0} and client.at == {}


def test_clients_of_a_manager_know_all_servers_and_count_apart() -> None:
    manager = ServerManager.__new__(ServerManager)
    manager.config, manager.server_addresses, manager.server_handles = {}, ["a", "b"], [1, 2]
    first, second = manager.get_client(), manager.get_client()
    asyncio.run(first._acquire_server("request"))
    assert first.servers == {"a": 1, "b": 2}
    assert (first.in_flight["a"], second.in_flight["a"]) == (1, 0)
