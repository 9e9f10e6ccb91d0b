"""What a run needs of its host: each check with made-up figures, and all of them together on a made-up machine."""

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from vopd.common import environment_checks, temporary
from vopd.common.environment_checks import MIB, Machine
from vopd.config import load
from vopd.errors import UserError

GOOD = Machine(
    shared_memory_free=2**34,
    open_files=4096,
    threads=100,
    thread_limit=10_000,
    privileged=False,
    devices=8,
    account="/",
)


def said(check, *arguments: object) -> str:
    """The sentence of a refusal, or an empty one."""
    try:
        check(*arguments)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("needed", "visible", "count", "sentence"),
    [
        (2, None, 2, ""),
        (2, "0,1", 2, ""),
        (1, "", 0, "needs 1 GPU, and CUDA_VISIBLE_DEVICES='' shows none"),
        (1, " ", 0, "shows none"),
        (2, "0", 1, "needs 2 GPUs, and CUDA_VISIBLE_DEVICES='0' shows 1"),
        (2, "0", 8, "shows 1; set it to 2"),  # what torch found earlier in this process
        (4, "0,9,8,7", 1, "shows 1"),
        (2, None, 1, "this machine has 1; give hardware.devices_per_node=1"),
        (1, None, 0, "no NVIDIA driver answers"),
    ],
)
def test_gpus(needed: int, visible: str | None, count: int, sentence: str) -> None:
    found = said(environment_checks.check_devices, needed, visible, count)
    assert bool(found) == bool(sentence) and sentence in found


def test_temporary_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary, "LONGEST_ROOT", len(os.fsencode(tmp_path)) + 1)
    assert (
        said(environment_checks.check_temporary, None) == "" == said(environment_checks.check_temporary, "")
    )
    assert said(environment_checks.check_temporary, str(tmp_path)) == ""
    longer = tmp_path / "ü"  # two bytes and the slash: one too many
    longer.mkdir()
    assert "too long for the sockets" in said(environment_checks.check_temporary, str(longer))
    assert "no such folder" in said(environment_checks.check_temporary, str(tmp_path / "gone"))
    monkeypatch.setattr(environment_checks.os, "access", lambda *_: False)
    assert "TMP=" in said(environment_checks.check_temporary, str(tmp_path), "TMP")
    assert "cannot be written" in said(environment_checks.check_writable, tmp_path / "later", "x")


def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "not" / "yet"
    assert said(environment_checks.check_room, folder, 1, "x") == ""
    assert "MiB free, and x needs" in said(environment_checks.check_room, folder, 2**60, "x")
    no_inodes = SimpleNamespace(f_files=9, f_favail=0, f_bavail=9, f_bfree=9, f_blocks=9, f_frsize=4096)
    monkeypatch.setattr(environment_checks.os, "statvfs", lambda _: no_inodes)
    assert "no free inodes" in said(environment_checks.check_room, folder, 1, "x")


def test_a_home_that_cannot_be_written_is_replaced(tmp_path: Path) -> None:
    good, place = tmp_path / "home", tmp_path / "cache"
    good.mkdir()
    for variables, account in (({"HOME": str(good)}, None), ({}, str(good))):
        before = dict(variables)
        assert environment_checks.replace_home(variables, account, place) is None and variables == before
    variables = {"HOME": str(tmp_path / "gone")}
    assert "cannot be written" in str(environment_checks.replace_home(variables, None, place))
    assert variables == {"HOME": str(place / "home")} and (place / "home").is_dir()
    variables = {}
    assert environment_checks.replace_home(variables, None, place) and variables["HOME"] == str(
        place / "home"
    )


def test_what_a_read_only_home_holds_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tmp_path / "home" / ".cache" / "huggingface"
    models.mkdir(parents=True)
    monkeypatch.setattr(environment_checks.os, "access", lambda path, _: str(path) != str(tmp_path / "home"))
    variables = {"HOME": str(tmp_path / "home")}
    assert environment_checks.replace_home(variables, None, tmp_path / "cache")
    assert variables["HF_HOME"] == str(models)
    kept = {"HOME": str(tmp_path / "home"), "HF_HOME": "/mine"}
    environment_checks.replace_home(kept, None, tmp_path / "cache")
    assert kept["HF_HOME"] == "/mine"


def test_without_any_place_for_caches_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = said(environment_checks.replace_home, {"HOME": "/gone"}, None, tmp_path / "file")
    assert "HOME=/gone cannot be written, and neither can" in found


def test_a_user_without_an_entry_gets_a_name() -> None:
    for variables, listed, wanted in (
        ({}, False, {"USER": "user"}),
        ({}, True, {}),
        ({"LOGNAME": "me"}, False, {"LOGNAME": "me"}),
    ):
        environment_checks.name_user(variables, listed)
        assert variables == wanted


def test_shared_memory() -> None:
    assert environment_checks.check_shared_memory(400 * MIB, 32 * MIB, 300 * MIB) is None
    assert "through the disk" in str(environment_checks.check_shared_memory(64 * MIB, 32 * MIB, 300 * MIB))
    found = said(environment_checks.check_shared_memory, 16 * MIB, 32 * MIB, 300 * MIB)
    assert "/dev/shm: 16 MiB free, and the run needs 32 MiB" in found


def test_what_a_run_puts_into_shared_memory_follows_its_settings() -> None:
    overrides = ["hardware.devices_per_node=2", "train.rollouts=4"]
    assert environment_checks.shared_memory_needs(load("grpo", overrides)) == (2 * 32 * MIB, 300_000_000)
    more = [
        "verl.ray_kwargs.ray_init.object_store_memory=1000",
        "verl.actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=7",
    ]
    assert environment_checks.shared_memory_needs(load("grpo", more)) == (7 * MIB, 1000)
    wrong = ["verl.ray_kwargs.ray_init.object_store_memory=much"]
    assert environment_checks.shared_memory_needs(load("grpo", wrong)) == (
        32 * MIB,
        0,
    )  # verl's own tree refuses it
    assert environment_checks.shared_memory_needs(load("grpo", ["profile=qwen3_5_4b_8gpu"])) == (0, 0)


def test_limits() -> None:
    assert (
        said(environment_checks.check_open_files, -1)
        == ""
        == said(environment_checks.check_open_files, environment_checks.OPEN_FILES)
    )
    assert "ulimit -n: at most 64 open files" in said(environment_checks.check_open_files, 64)
    needed = environment_checks.THREADS + environment_checks.THREADS_PER_RANK
    assert said(environment_checks.check_threads, 10 + needed, 10, 1, False) == ""
    assert "ulimit -u" in said(environment_checks.check_threads, 9 + needed, 10, 1, False)
    assert (
        said(environment_checks.check_threads, 1, 10, 1, True)
        == ""
        == said(environment_checks.check_threads, -1, 10, 1, False)
    )
    assert environment_checks.user_threads() > 0


def test_local_traffic_bypasses_proxies() -> None:
    variables = {"https_proxy": "http://p:1", "NO_PROXY": "intern, 127.0.0.1"}
    environment_checks.bypass_proxies(variables)
    assert variables["no_proxy"] == variables["NO_PROXY"] == "intern,127.0.0.1,localhost,::1"
    for untouched in ({}, {"NO_PROXY": "a"}, {"ALL_PROXY": "http://p:1", "no_proxy": "*"}):
        before = dict(untouched)
        environment_checks.bypass_proxies(untouched)
        assert untouched == before


def test_httpx_goes_straight_to_this_machine_then(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    variables = dict(os.environ)
    environment_checks.bypass_proxies(variables)
    monkeypatch.setenv("NO_PROXY", variables["NO_PROXY"])
    client = httpx.Client()
    direct = client._transport
    for address, straight in (
        ("http://localhost:1", True), ("http://127.0.0.1:1", True), ("http://[::1]:1", True), ("http://x.org", False)
    ):  # fmt: skip
        assert (client._transport_for_url(httpx.URL(address)) is direct) == straight, address


@pytest.mark.parametrize(
    ("variables", "has_socks", "sentence"),
    [
        ({}, False, ""),
        ({"HTTP_PROXY": "http://user:hunter2@p:3128"}, False, ""),
        ({"http_proxy": "p:3128"}, False, ""),
        ({"ALL_PROXY": "socks5://hunter2@p:1"}, True, ""),
        (
            {"ALL_PROXY": "socks5://hunter2@p:1"},
            False,
            "ALL_PROXY names a SOCKS proxy, for which the package socksio",
        ),
        ({"all_proxy": "socks4://hunter2@p:1"}, True, "all_proxy names no proxy that can be used"),
        ({"HTTPS_PROXY": "http://hunter2:port:x"}, True, "HTTPS_PROXY names no proxy"),
        ({"HTTPS_PROXY": "http://"}, True, "HTTPS_PROXY names no proxy"),
    ],
)
def test_proxies_are_usable(variables: dict[str, str], has_socks: bool, sentence: str) -> None:
    found = said(environment_checks.check_proxies, variables, has_socks)
    assert bool(found) == bool(sentence) and sentence in found
    assert "hunter2" not in found


def test_a_run_on_one_machine_has_its_own_ray() -> None:
    variables = {"RAY_ADDRESS": "cluster:6379"}
    assert "RAY_ADDRESS=cluster:6379 is not used" in str(environment_checks.own_ray(variables, 1))
    assert variables == {} and environment_checks.own_ray(variables, 1) is None
    assert environment_checks.own_ray({"RAY_ADDRESS": "cluster:6379"}, 2) is None
    assert "needs a Ray cluster" in said(environment_checks.own_ray, {}, 2)


def test_steering_variables_are_named_and_not_shown() -> None:
    variables = {"VLLM_USE_X": "hunter2", "RAY_y": "1", "PATH": "/", "VLLM_OURS": "1"}
    note = environment_checks.steering_note(variables, {"VLLM_OURS": "0"})
    assert note == "the environment sets RAY_y, VLLM_USE_X: the libraries follow them"
    assert environment_checks.steering_note({"PATH": "/"}, {}) is None


def prepared(variables: dict[str, str], tmp_path: Path, *overrides: str, **machine: object) -> list[str]:
    here = dataclasses.replace(GOOD, **machine)
    return environment_checks.prepare_run(load("vision_opd", list(overrides)), variables, {}, tmp_path, here)


@pytest.mark.parametrize(
    ("overrides", "machine", "sentence"),
    [
        ([], {"shared_memory_free": 0}, "/dev/shm"),
        ([], {"open_files": 100}, "ulimit -n"),
        ([], {"thread_limit": 300}, "ulimit -u"),
        (["profile=qwen3_5_4b_8gpu"], {"devices": 7}, "needs 8 GPUs"),
    ],
)
def test_a_run_is_refused_on_a_machine_that_lacks_something(
    overrides: list[str], machine: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    variables = {"HOME": str(tmp_path)}
    assert prepared(variables, tmp_path, *overrides) == []
    assert sentence in said(lambda: prepared(variables, tmp_path, *overrides, **machine))


def test_a_run_on_a_cpu_needs_no_proxy_and_one_on_gpus_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment_checks, "has_socks", lambda: False)
    variables = {"HOME": str(tmp_path), "ALL_PROXY": "socks5://p:1"}
    assert prepared(variables, tmp_path) == []
    assert variables["NO_PROXY"] == "localhost,127.0.0.1,::1"
    assert "socksio" in said(lambda: prepared(variables, tmp_path, "profile=qwen3_5_4b_8gpu"))


def test_notes_of_a_run(tmp_path: Path) -> None:
    variables = {"HOME": "/gone", "RAY_ADDRESS": "c:1", "VLLM_X": "1"}
    notes = prepared(variables, tmp_path, shared_memory_free=64 * MIB)
    assert [note.split()[0] for note in notes] == ["RAY_ADDRESS=c:1", "/dev/shm", "HOME=/gone", "the"]


def test_this_machine_is_looked_at(tmp_path: Path) -> None:
    here = environment_checks.machine("cpu")
    assert here.open_files and here.devices == 0
    variables = {"HOME": str(tmp_path)}
    assert (
        environment_checks.prepare_engine(
            variables, tmp_path, dataclasses.replace(GOOD, account=here.account)
        )
        == []
    )
