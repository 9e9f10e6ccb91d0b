"""Workers forked from a warm process: what they inherit, what they do not, and when they end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vopd.backbone.cpu import fork_server
from vopd.common import heartbeat, processes

STARTER = """
import os, sys
from pathlib import Path
from vopd.backbone.cpu import fork_server
fork_server.MODULES = ("colorsys",)
os.environ["ONLY_THE_STARTER_HAS"] = "1"
holding = fork_server.start(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
"""
SCRIPT = """
import json, os, sys
print(json.dumps({
    "arguments": sys.argv[1:], "folder": os.getcwd(), "loaded": "colorsys" in sys.modules,
    "name": __name__, "mine": os.environ.get("MINE"), "theirs": os.environ.get("ONLY_THE_STARTER_HAS"),
    "random": __import__("random").random(), "parent": os.getppid(), "read": sys.stdin.read(),
}))
sys.stderr.write("to stderr")
if "fail" in sys.argv: raise ValueError("the script failed")
"""


@contextmanager
def server(address: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(address)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait(20)
        process.stdout.close()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    return file


def ask(address: Path, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        f"{fork_server.executable(address)} {script} {' '.join(arguments)}",
        shell=True,
        input="from the terminal",
        capture_output=True,
        text=True,
        timeout=30,
        cwd=script.parent,
        env={"MINE": "yes", "LONG": "x" * 100_000},
    )


def test_a_worker_is_what_was_asked_for(tmp_path: Path, script: Path) -> None:
    with server(tmp_path / "address"):
        first, second = (parsed(ask(tmp_path / "address", script, "a", "b")) for _ in range(2))
    assert first["arguments"] == ["a", "b"] and first["folder"] == str(tmp_path)
    assert first["loaded"] and first["name"] == "__main__"
    assert first["mine"] == "yes" and first["theirs"] is None
    assert first["read"] == "from the terminal"
    assert first["parent"] == second["parent"]
    assert first["random"] != second["random"]


def parsed(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert done.returncode == 0 and done.stderr == "to stderr"
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_how_a_worker_ended_is_kept_where_the_run_can_read_it(
    tmp_path: Path, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(processes.MARK, str(tmp_path))
    (tmp_path / heartbeat.FOLDER).mkdir()
    script.write_text(
        "import os, signal, sys; print(os.getpid(), flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    )
    with server(tmp_path / "address"):
        pid = int(ask(tmp_path / "address", script).stdout)
        while pid not in heartbeat.ended(tmp_path):
            time.sleep(0.05)
        assert heartbeat.ended(tmp_path)[pid] == -signal.SIGSEGV
        assert parsed(ask(tmp_path / "address", _again(script)))["loaded"]


def _again(script: Path) -> Path:
    script.write_text(SCRIPT)
    return script


def test_a_failing_script_leaves_its_trace(tmp_path: Path, script: Path) -> None:
    with server(tmp_path / "address"):
        done = ask(tmp_path / "address", script, "fail")
    assert "ValueError: the script failed" in done.stderr


def test_without_a_server_the_script_runs_by_itself(tmp_path: Path, script: Path) -> None:
    found = parsed(ask(tmp_path / "nobody", script, "a"))
    assert found["arguments"] == ["a"] and found["loaded"] is False


def test_the_server_ends_with_the_process_that_holds_it(tmp_path: Path, script: Path) -> None:
    with server(tmp_path / "address") as starter:
        pid = int(str(parsed(ask(tmp_path / "address", script))["parent"]))
        assert Path(f"/proc/{pid}").exists() and pid != starter.pid
        starter.kill()
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "before",
    ["import ray", "import threading, time; threading.Thread(target=time.sleep, args=(30,)).start()"],
)
def test_refuses_a_process_that_cannot_be_forked(tmp_path: Path, before: str) -> None:
    code = (
        f"{before}\nimport os\nfrom pathlib import Path\n"
        "from vopd.backbone.cpu import fork_server\nfork_server.MODULES = ()\n"
        + (
            textwrap.dedent("""
        try:
            fork_server.start(Path("address"))
        except RuntimeError as error:
            print(error, flush=True)
            os._exit(0)
        """)
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        stdin=subprocess.PIPE,
        cwd=tmp_path,
        timeout=60,
    )
    assert "can only be forked" in done.stdout


@pytest.mark.distributed
def test_ray_takes_its_workers_from_there(tmp_path: Path) -> None:
    """Ray's `py_executable`, as of the pinned version: the actor's process is a child of the server."""
    code = """
import os, sys
from pathlib import Path
from vopd.backbone.cpu import fork_server
fork_server.MODULES = ("colorsys",)
fork_server.start(Path(sys.argv[1]) / "address")
import ray
ray.init(
    num_cpus=1, address="local", include_dashboard=False, _temp_dir=sys.argv[1],
    runtime_env={"py_executable": fork_server.executable(Path(sys.argv[1]) / "address")},
)

@ray.remote
class Worker:
    def look(self):
        import sys
        return "colorsys" in sys.modules, os.getppid()

loaded, parent = ray.get(Worker.remote().look.remote(), timeout=60)
print("worker", loaded, Path(f"/proc/{parent}/stat").read_text().split()[3] == str(os.getpid()))
ray.shutdown()
"""
    folder = Path("/tmp") / f"vopd-warm-{os.getpid()}"  # short: Ray's sockets lie below it
    folder.mkdir()
    environment = {**os.environ, "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    shutil.rmtree(folder, ignore_errors=True)
    assert "worker True True" in done.stdout, done.stderr[-3000:]
