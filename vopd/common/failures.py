"""From an exception to what the user is told: the cause, its place, the process, and the exit code.

An error in one of a run's processes reaches the driver in wrappers: Ray's, whose text begins with the wrapper, vLLM's,
which says "see root cause above", our own. What is told is the innermost error's own line, and, where a recipe's module
is among its frames, that module's file and line. This module imports neither torch nor Ray.
"""

from __future__ import annotations

import json
import re
import signal
import sysconfig
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vopd.common import files, processes
from vopd.common.paths import ROOT
from vopd.common.redaction import redacted
from vopd.errors import UserError

OURS = ("vopd", "data", "benchmarks", "tests", "scripts")
METHOD = "def build(settings: Settings)"  # what makes a module a method's (vopd/method.py)
FAILURE = "failure.json"
"""In a run folder: what the driver has to say of its end (the fields of `Failure`)."""
LONGEST = 400
LOST = "lost"
"""The kind of a failure that says no more than that a process is gone."""
ENGINE_DEAD = ("EngineDeadError", "EngineGenerateError")
ENGINE_FAILED = "Engine core initialization failed"
HINTS = {
    "OutOfMemoryError": "lower train.max_tokens_per_micro_batch, train.chunk or rollout.memory_share",
    "MemoryError": "lower train.max_tokens_per_micro_batch, train.chunk or rollout.max_batch",
}

_FRAME = re.compile(
    r'^ *File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)\n(?:    +(?P<source>[^\s^~].*)\n)?',
    re.M,
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RAY = re.compile(r"ray::(?P<title>\w+)[^\n]*?\(pid=(?P<pid>\d+)")
_ENGINE_LINE = re.compile(
    r"^(?:\([^()]*\) )?\((?:EngineCore|Worker)[^()]*\) ?(?:(?:ERROR|CRITICAL) \S+ \S+ \[[^\]]+\] ?)?(?P<text>.*)$"
)
_TRACEBACK = "Traceback (most recent call last):"


@dataclass(frozen=True)
class Failure:
    """What the user is told.

    Args:
        sentence: the cause, one line: `TypeName: message`, or the sentence of an error of our own.
        code: the exit code: 2 where the user can fix it (UserError), else 1.
        kind: the exception's type, or `LOST`.
        where: file, line and source line of a recipe's mistake; empty where no recipe is involved.
        process: where it was raised, such as `trainer worker (pid 123)`; empty: the driver.
    """

    sentence: str
    code: int = 1
    kind: str = ""
    where: str = ""
    process: str = ""

    def line(self) -> str:
        """The cause and its place, as one line."""
        return f"{self.sentence} [{self.where}]" if self.where else self.sentence


class ExplainedError(RuntimeError):
    """Raised in place of an error that was explained elsewhere, where its frames were at hand."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.line())
        self.failure = failure

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.failure,)


def explain(error: BaseException, engine_log: str = "", ends: Mapping[int, int] | None = None) -> Failure:
    """The failure that this exception tells of.

    Args:
        error: as it was caught; wrappers of Ray, chains and groups are taken off.
        engine_log: what vLLM's engine wrote, for errors that only say that it failed.
        ends: pid -> exit code, of processes whose end was seen.
    """
    process = ""
    texts: list[str] = []
    while True:
        if isinstance(error, ExplainedError):
            return error.failure
        texts.append(_text(error))
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif _is_ray(error, "RayTaskError"):
            process = _process(str(error)) or process
            error = error.cause  # type: ignore[attr-defined]
        elif not isinstance(error, UserError) and (mendable := _user_error(error)):
            error = mendable
        else:
            break
    if _is_ray(error, "RayError"):
        failure = _of_ray(error, process, ends or {})
        # Its options parser ends the server's process in good order, behind a sentence of its own.
        server = failure.kind == LOST and "vLLM server" in failure.sentence and from_engine_log(engine_log)
        return _of_engine(failure, engine_log) if server else failure
    failure = _of_plain(error, process, texts)
    engine = failure.kind in ENGINE_DEAD or ENGINE_FAILED in failure.sentence
    return _of_engine(failure, engine_log) if engine else failure


def hand_over(folder: Path, failure: Failure) -> None:
    """Leave the failure for the terminal's process, whole or not at all, without the environment's secrets."""
    with suppress(OSError):  # a full disk: the terminal's process sees that itself
        files.write_text(folder / FAILURE, redacted(json.dumps(asdict(failure))))


def received(folder: Path) -> Failure | None:
    """The failure that the driver has left; None if it has left none that can be read."""
    try:
        return Failure(**json.loads((folder / FAILURE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def ended(code: int, process: str, memory_kills: int) -> Failure:
    """The failure of a process that ended without an error of its own.

    Args:
        code: its exit code; negative: the signal.
        process: its role and pid.
        memory_kills: how many processes the kernel ended for lack of memory meanwhile.
    """
    how = f"was killed by {processes.signal_name(-code)}" if code < 0 else f"ended with code {code}"
    return Failure(f"the {process} {how}{_why(code, memory_kills)}", kind=LOST)


def _why(code: int, memory_kills: int) -> str:
    if code == -signal.SIGKILL:
        of_memory = "the kernel ended it for lack of memory"
        return f": {of_memory}" if memory_kills else ", from outside or for lack of memory"
    return ": is /dev/shm full?" if code == -signal.SIGBUS else ""


def from_engine_log(text: str) -> str:
    """The last line of the first traceback that vLLM's engine or its workers wrote; or what its options parser said."""
    lines = [_COLOUR.sub("", line) for line in text.splitlines()]
    engine = [found.group("text") for line in lines if (found := _ENGINE_LINE.match(line))]
    for start, line in enumerate(engine):
        if line.strip() == _TRACEBACK:
            after = (line for line in engine[start + 1 :] if line and not line.startswith(" "))
            return next(after, "").strip()
    parser = (found.group(1) for line in lines if (found := re.search(r"\S: error: (.+)$", line)))
    return next(parser, "")


def last_line(text: str) -> str:
    """The line of a printed traceback that names the error: the first that is not indented behind the last frame."""
    frames = list(_FRAME.finditer(text))
    rest = text[frames[-1].end() :] if frames else text
    lines = [line for line in rest.splitlines() if line.strip() and not line.startswith(" ")]
    return lines[0].strip() if lines else ""


def recipe_frame(texts: Iterable[str]) -> str:
    """The innermost frame of printed tracebacks that is in a recipe's module, with its source line."""
    for text in texts:
        for frame in reversed(list(_FRAME.finditer(_COLOUR.sub("", text)))):
            if is_recipe(Path(frame["file"])):
                return _place(frame)
    return ""


def is_recipe(file: Path) -> bool:
    """Whether a source file is a recipe's: neither a library's nor the trainer's own."""
    if not file.is_absolute() or "site-packages" in file.parts or "dist-packages" in file.parts:
        return False
    if file.is_relative_to(ROOT):
        name = file.relative_to(ROOT)
        # A method that ships with the package is beside the modules that all methods share.
        beside = len(name.parts) == 2 and file.is_file() and METHOD in file.read_text(errors="replace")
        return name.parts[0] not in OURS or beside
    return not file.is_relative_to(sysconfig.get_path("stdlib"))


def one_line(text: str) -> str:
    """Text without line breaks and colours, cut to a length that a terminal shows."""
    line = " ".join(_COLOUR.sub("", text).split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def _place(frame: re.Match[str]) -> str:
    source = f": {frame['source'].strip()}" if frame["source"] else ""
    return f"{frame['file']}, line {frame['line']}, in {frame['name']}{source}"


def _text(error: BaseException) -> str:
    """Frames and last line of an error and of what it came from; Ray's hold those of the other process as text."""
    return "".join(traceback.format_exception(error))


def _is_ray(error: BaseException, name: str) -> bool:
    return any(c.__name__ == name and c.__module__ == "ray.exceptions" for c in type(error).__mro__)


def _user_error(error: BaseException) -> BaseException | None:
    """A UserError, or an error that was explained, that this one was raised from; Ray's wrappers looked into."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        inner = getattr(cause, "cause", None) if _is_ray(cause, "RayTaskError") else cause
        if isinstance(inner, UserError | ExplainedError):
            return cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def _process(text: str) -> str:
    """Role and pid of the innermost process that Ray's text names."""
    named = list(_RAY.finditer(text))
    if not named:
        return ""
    title, pid = named[-1]["title"], named[-1]["pid"]
    return f"{processes.role_of_title(f'ray::{title}') or title} (pid {pid})"


def _of_plain(error: BaseException, process: str, texts: list[str]) -> Failure:
    name, message = type(error).__name__, one_line(str(error))
    if isinstance(error, UserError):
        return Failure(message, UserError.exit_code, name, "", process)
    where = recipe_frame(reversed(texts))
    if type(error).__module__.partition(".")[0] in OURS:
        return Failure(message, 1, name, where, process)
    if not message and not where:  # a bare assert: its line is all there is
        frames = [frame for text in reversed(texts) for frame in _FRAME.finditer(text)]
        where = _place(frames[-1]) if frames else ""
    hint = f" ({HINTS[name]})" if name in HINTS else ""
    return Failure(f"{name}: {message}{hint}" if message else name, 1, name, where, process)


def _of_ray(error: BaseException, process: str, ends: Mapping[int, int]) -> Failure:
    """Errors of Ray itself: a process is gone, its constructor failed, or an exception could not travel."""
    text = _COLOUR.sub("", str(error))
    name = type(error).__name__
    process = _process(text) or process
    title, pid = (re.search(rf"\b{key}: (\S+)", text) for key in ("class_name", "pid"))
    if title:
        named = title.group(1).rpartition(".")[2]  # verl makes one of its classes inside a function
        who = processes.role_of_title(f"ray::{named}") or named
        who += f" (pid {pid.group(1)})" if pid else ""
        if pid and int(pid.group(1)) in ends:
            return ended(ends[int(pid.group(1))], who, 0)
        return Failure(f"the {who} is gone: it was killed or it crashed", 1, LOST)
    if _FRAME.search(text):
        told = last_line(text.split("Original exception:")[-1])
        kind, _, message = told.partition(": ")
        kind = kind.rpartition(".")[2]
        if kind == UserError.__name__:
            return Failure(one_line(message), UserError.exit_code, kind, "", process)
        return Failure(one_line(f"{kind}: {message}"), 1, kind, recipe_frame([text]), process)
    gone = ("ActorDiedError", "WorkerCrashedError", "NodeDiedError", "LocalRayletDiedError", "RayActorError")
    return Failure(f"{name}: {one_line(text)}", 1, LOST if name in gone else name, "", process)


def _of_engine(failure: Failure, log: str) -> Failure:
    cause = from_engine_log(log)
    if cause:
        kind = re.match(r"[\w.]+(?=:)", cause)
        name = kind.group(0).rpartition(".")[2] if kind else "Engine"
        return replace(failure, sentence=f"vLLM's engine failed: {one_line(cause)}", kind=name)
    return replace(failure, sentence="the vLLM engine is gone: it was killed or it crashed", kind=LOST)
