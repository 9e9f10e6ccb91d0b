"""What the user is told of an error: the innermost one's own line, the recipe's file and line, the exit code."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import ray
from ray.exceptions import ActorDiedError, RayTaskError

from vopd.common import failures
from vopd.common.failures import ROOT, ExplainedError, Failure, ended, explain, from_engine_log, is_recipe
from vopd.errors import UserError

RECIPE = "def score(chunk):\n    return fraction(chunk)\n\n\ndef fraction(chunk):\n    return 1 / chunk\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe's module outside the repository whose `score(0)` divides by zero in its line 6."""
    file = tmp_path / "mine.py"
    file.write_text(RECIPE)
    return file


def caught(call: object, *arguments: object) -> Exception:
    """The error that a call raises."""
    with pytest.raises(Exception) as found:
        call(*arguments)  # type: ignore[operator]
    return found.value


def mistake(recipe: Path) -> Exception:
    """The error of that module's `score`, with its frames."""
    names: dict[str, object] = {}
    exec(compile(recipe.read_text(), str(recipe), "exec"), names)
    return caught(names["score"], 0)


def as_ray_gives_it(
    error: Exception, title: str = "ray::WorkerDict.update_actor", pid: int = 77
) -> Exception:
    """The error as the driver sees it that was raised in another process."""
    text = "".join(traceback.format_exception(error))
    remote = RayTaskError(
        "update_actor",
        f"{text}",
        error,
        proctitle=title,
        pid=pid,
        ip="127.0.0.1",
        actor_repr="<x>",
        actor_id="a",
    )
    return remote.as_instanceof_cause()


def test_a_recipes_mistake_in_another_process_names_its_file_line_and_source(recipe: Path) -> None:
    failure = explain(as_ray_gives_it(mistake(recipe)))
    assert failure == Failure(
        "ZeroDivisionError: division by zero",
        1,
        "ZeroDivisionError",
        f"{recipe}, line 6, in fraction: return 1 / chunk",
        "trainer worker (pid 77)",
    )


def test_the_innermost_of_several_wrappers_is_told(recipe: Path) -> None:
    inner = as_ray_gives_it(mistake(recipe), "ray::vLLMHttpServer.generate", 5)
    failure = explain(as_ray_gives_it(inner, "ray::ViewRolloutWorker.run", 6))
    assert failure.sentence == "ZeroDivisionError: division by zero"
    assert failure.process == "vLLM server (pid 5)"
    assert failure.where.startswith(f"{recipe}, line 6")


@pytest.mark.parametrize(
    "wrap", [lambda e: e, as_ray_gives_it, lambda e: as_ray_gives_it(as_ray_gives_it(e))]
)
def test_a_user_error_arrives_as_itself(wrap: object) -> None:
    error = caught(_raise, UserError("Row 7, column image:\nnot readable."))
    failure = explain(wrap(error))  # type: ignore[operator]
    assert (failure.sentence, failure.code, failure.where) == ("Row 7, column image: not readable.", 2, "")


def test_a_user_error_that_a_library_has_wrapped_arrives_as_itself() -> None:
    def wrapped() -> None:
        try:
            raise UserError("give another row")
        except UserError as error:
            raise RuntimeError("instantiation failed") from error

    assert explain(caught(wrapped)) == Failure("give another row", 2, "UserError")


def test_groups_are_opened() -> None:
    group = ExceptionGroup("several", [ExceptionGroup("inner", [UserError("the first")]), ValueError("b")])
    assert explain(group).sentence == "the first"


def test_what_was_explained_elsewhere_is_kept_on_its_way_through_ray() -> None:
    failure = Failure("KeyError: 'a'", 1, "KeyError", "/x.py, line 3, in f: d['a']", "rollout worker (pid 9)")
    error = pickle.loads(pickle.dumps(ExplainedError(failure)))
    assert explain(error) == failure
    assert explain(as_ray_gives_it(error)) == failure


def test_a_bare_assert_is_told_with_its_line() -> None:
    failure = explain(caught(_raise, AssertionError()))
    assert failure.sentence == "AssertionError"
    assert failure.where.startswith(__file__) and failure.where.endswith("in _raise: raise error")


def test_long_texts_become_one_line() -> None:
    failure = explain(caught(_raise, ValueError("a\n\tb\x1b[31m" + "x" * 1000)))
    assert failure.sentence.startswith("ValueError: a bx")
    assert len(failure.sentence) < 450 and "\n" not in failure.sentence


def test_a_lack_of_memory_says_what_to_lower() -> None:
    assert "max_tokens_per_micro_batch" in explain(caught(_raise, MemoryError("no"))).sentence


def test_an_actor_that_is_gone_is_told_by_its_role() -> None:
    error = ActorDiedError()
    error.error_msg = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: ViewRolloutWorker\n\tactor_id: 1\n"
        "\tpid: 31\n\tip: 127.0.0.1\nThe actor is dead because its worker process has died."
    )
    failure = explain(error)
    assert failure.sentence == "the rollout worker (pid 31) is gone: it was killed or it crashed"
    assert (failure.kind, failure.code) == (failures.LOST, 1)
    error.error_msg = error.error_msg.replace("ViewRolloutWorker", "create.<locals>.WorkerDict")
    assert explain(error).sentence.startswith("the trainer worker (pid 31) is gone")
    error.error_msg = error.error_msg.replace("create.<locals>.WorkerDict", "ViewRolloutWorker")
    assert explain(error, ends={31: -11}).sentence == "the rollout worker (pid 31) was killed by SIGSEGV"


def test_an_actor_whose_constructor_failed_is_told_by_the_error(recipe: Path) -> None:
    for error, sentence, code in [
        (mistake(recipe), "ZeroDivisionError: division by zero", 1),
        (caught(_raise, UserError("choose another")), "choose another", 2),
    ]:
        cause = as_ray_gives_it(error, "ray::WorkerDict.__init__")
        failure = explain(ActorDiedError.from_task_error(_plain(cause)))
        assert (failure.sentence, failure.code, failure.process) == (
            sentence,
            code,
            "trainer worker (pid 77)",
        )


LOG = """\
(EngineCore pid=7) WARNING 11-28 09:34:44 [cpu_worker.py:114] libiomp is not found
(EngineCore pid=7) ERROR 11-28 09:34:45 [core.py:1231] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-28 09:34:45 [core.py:1231] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-28 09:34:45 [core.py:1231]   File "/x/core.py", line 1200, in run_engine_core
(EngineCore pid=7) ERROR 11-28 09:34:45 [core.py:1231]     engine_core = EngineCoreProc()
(EngineCore pid=7) ERROR 11-28 09:34:45 [core.py:1231]                   ^^^^^^^^^^^^^^^^
(EngineCore pid=7) ERROR 11-28 09:34:45 [core.py:1231] NotImplementedError: not for 'Float'
(EngineCore pid=7) Process EngineCore:
(EngineCore pid=7) Traceback (most recent call last):
(EngineCore pid=7)   File "/y/process.py", line 314, in _bootstrap
(EngineCore pid=7) NotImplementedError: not for 'Float'
"""


@pytest.mark.parametrize("prefix", ["", "\x1b[36m(vLLMHttpServer pid=6736)\x1b[0m "])
def test_the_engines_own_error_is_found_in_its_log(prefix: str) -> None:
    text = "".join(f"{prefix}{line}\n" for line in LOG.splitlines())
    error = caught(_raise, RuntimeError("Engine core initialization failed. See root cause above."))
    failure = explain(as_ray_gives_it(error, "ray::vLLMHttpServer.launch_server"), text)
    assert failure.sentence == "vLLM's engine failed: NotImplementedError: not for 'Float'"
    assert failure.process == "vLLM server (pid 77)"


def test_an_engine_that_died_without_a_word_is_a_process_that_is_gone() -> None:
    class EngineDeadError(Exception):
        pass

    assert explain(caught(_raise, EngineDeadError("See stack trace (above)"))).kind == failures.LOST


def test_a_server_that_its_options_parser_ended_says_what_the_parser_said() -> None:
    error = ActorDiedError()
    error.error_msg = "The actor died.\n\tclass_name: vLLMHttpServer\n\tpid: 31\n"
    log = "usage: x [-h]\nx: error: argument --dtype: invalid choice: 'no'\n"
    assert (
        explain(error, log, {31: 0}).sentence
        == "vLLM's engine failed: argument --dtype: invalid choice: 'no'"
    )
    assert explain(error, "", {31: 0}).sentence == "the vLLM server (pid 31) ended with code 0"


def test_an_option_that_vllm_does_not_have_is_found_in_its_log() -> None:
    assert from_engine_log("usage: x [-h]\nx: error: unrecognized arguments: --foo 3\n") == (
        "unrecognized arguments: --foo 3"
    )


@pytest.mark.parametrize(
    ("code", "kills", "said"),
    [
        (-signal.SIGKILL, 1, "was killed by SIGKILL: the kernel ended it for lack of memory"),
        (-signal.SIGKILL, 0, "was killed by SIGKILL, from outside or for lack of memory"),
        (-signal.SIGSEGV, 0, "was killed by SIGSEGV"),
        (-signal.SIGBUS, 0, "was killed by SIGBUS: is /dev/shm full?"),
        (3, 0, "ended with code 3"),
    ],
)
def test_a_process_that_ended_without_an_error(code: int, kills: int, said: str) -> None:
    assert ended(code, "driver (pid 1)", kills).sentence == f"the driver (pid 1) {said}"


@pytest.mark.parametrize(
    ("file", "whether"),
    [
        (ROOT / "baselines/grpo.py", True),
        (ROOT / "vopd/vision_opd_sampled.py", True),
        (ROOT / "runs/mine.py", True),
        (ROOT / "vopd/method.py", False),
        (ROOT / "vopd/backbone/head.py", False),
        (Path(traceback.__file__), False),
        (Path(ray.__file__), False),
        (Path("/tmp/mine.py"), True),
        (Path("python/ray/_raylet.pyx"), False),
    ],
)
def test_which_files_are_recipes(file: Path, whether: bool) -> None:
    assert is_recipe(file) is whether


def test_a_failure_is_handed_over(tmp_path: Path) -> None:
    failure = Failure("a", 2, "b", "c", "d")
    assert failures.received(tmp_path) is None
    failures.hand_over(tmp_path, failure)
    assert failures.received(tmp_path) == failure
    (tmp_path / failures.FAILURE).write_text('{"sentence"')
    assert failures.received(tmp_path) is None


def test_importing_it_imports_neither_torch_nor_ray() -> None:
    modules = "vopd.common.failures, vopd.runner.monitor, vopd.runner.lock"
    code = f"import sys, {modules}; assert not {{'torch', 'ray'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})


def _raise(error: Exception) -> None:
    raise error


def _plain(error: Exception) -> RayTaskError:
    """Before Ray makes it an instance of its cause's class too."""
    cause = error.cause  # type: ignore[attr-defined]
    text = "".join(traceback.format_exception(cause))
    return RayTaskError(
        "f", text, cause, proctitle="ray::WorkerDict.__init__", pid=77, ip="1", actor_repr="<x>"
    )
