"""`vopd evaluate model=... benchmarks=[...] [key=value ...]`: ask what is missing, score, print the table.

Without `endpoint` a `vllm serve` of the model is started (`server.py`) and ended. Results land in
<out>/<model>/<benchmark>/: records.jsonl (one line per answer, appended as it arrives), settings.json
and summary.json. An interrupted evaluation resumes; a finished one is only scored again. docs/evaluation.md
says what the figures mean.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vopd import bounds
from vopd.bounds import above, within
from vopd.common import (
    caches,
    control_tokens,
    environment_checks,
    files,
    fingerprint,
    model_folder,
    provenance,
)
from vopd.common.chat_client import one_line
from vopd.common.command import reports_errors
from vopd.common.overrides import Tree
from vopd.common.paths import ROOT
from vopd.common.redaction import check_address, redacted
from vopd.common.terminal import Terminal
from vopd.errors import UserError
from vopd.evaluation import acceptance, asking, benchmark, judge, metrics, results, server
from vopd.evaluation.endpoint import (
    Endpoint,
    Resizing,
    Sampling,
    opens_reasoning,
    resizing_if_known,
    tokens_if_known,
)
from vopd.evaluation.records import read_answers

# Files of a benchmark's folder of records; settings.json says that they are ours.
WRITTEN = ("records.jsonl", "judge.jsonl", "summary.json")
PICTURES = ("published", "official")
ANSWERING = (
    "model",
    "name",
    "model_hash",
    "engine",
    "thinking",
    "temperature",
    "top_p",
    "max_tokens",
    "seed",
    "prompt",
    "data",
    "pictures",
)


@dataclass
class Judge:
    """An OpenAI-compatible server that judges what the rules leave open; off without an endpoint."""

    endpoint: str | None = None
    model: str | None = None


@dataclass
class Settings:
    """Everything an evaluation can be told. Defaults: greedy, non-thinking, the paper's token limit and seed."""

    model: str = MISSING
    benchmarks: list[str] = MISSING
    views: list[str] = field(default_factory=lambda: ["full", "crop"])
    endpoint: str | None = None
    thinking: bool = False
    temperature: float = within(0.0, 0, 10)
    top_p: float = above(1.0, 0, 1)
    max_tokens: int = within(32768, 1, 10_000_000)
    seed: int = within(42, 0, 2**31 - 1)
    concurrency: int = within(64, 1, 4096)
    timeout: float = above(600.0, 0, 1_000_000)
    rows: int = within(0, 0, 100_000_000)
    data: str = ".cache/benchmarks"
    out: str = "${oc.env:VOPD_RUNS,runs}/evaluation"
    scorer: str = "strict"
    pictures: str = "published"
    acceptance: str | None = None
    exclude: list[str] = field(default_factory=list)
    judge: Judge = field(default_factory=Judge)
    speed: bool = False
    vllm: dict[str, Any] = field(default_factory=dict)


HELP = """usage: vopd evaluate model=FOLDER|ID benchmarks=[NAME,...] [key=value ...] [--speed]

model        Hugging Face folder or hub id; with endpoint=... the name the server knows the model by
benchmarks   {known}, or the path of a YAML file
views        full, crop (the latter where a benchmark has crops)
endpoint     OpenAI-compatible server, such as http://localhost:8000/v1; without one, vLLM is started
rows         only the first so many questions of each benchmark; 0 is all
data         folder with one folder a benchmark, in the published layout; what is not there is downloaded
scorer       strict, or official: as the published evaluation does, defects included
pictures     published, or official: as the paper's evaluation encodes those of V* (PNG, made smaller above 20 MiB)
acceptance   {accepted}, or the path of a YAML file: compare with published figures
exclude      exclusion lists (JSON): a second, de-overlapped variant of each figure
judge        endpoint and model of a server that judges: strict, what could not be read; official, all not yet right
speed        print 1 / mean seconds per question (the paper's Figure 6); use concurrency=1 for one at a time
vllm.KEY     further options of `vllm serve`, such as vllm.tensor_parallel_size=4

Settings and their defaults:

{settings}"""


def help_text() -> str:
    """Usage and every setting with its default."""
    known = ", ".join(sorted(p.stem for p in benchmark.FOLDER.glob("*.yaml")))
    accepted = ", ".join(sorted(p.stem for p in acceptance.FOLDER.glob("*.yaml")))
    return HELP.format(
        known=known, accepted=accepted, settings=OmegaConf.to_yaml(OmegaConf.structured(Settings))
    )


def settings_of(overrides: list[str]) -> Settings:
    """Settings from `key=value` overrides; UserError for an unknown key, a wrong type or value, or a missing one."""
    overrides = ["speed=true" if override == "--speed" else override for override in overrides]
    merged = Tree(OmegaConf.structured(Settings), open=("vllm",)).override(overrides)
    settings: Settings = OmegaConf.to_object(merged)  # type: ignore[assignment]
    bounds.check(Settings, settings)
    for key in ("benchmarks", "views", "exclude"):
        if not all(isinstance(item, str) and item for item in getattr(settings, key)):
            raise UserError(f"{key} holds something other than names; write '{key}=[NAME,NAME]' in quotes.")
    if not settings.benchmarks:
        raise UserError("benchmarks is empty; name one (--help lists them).")
    if not model_name(settings.model).strip(". ") or not settings.model.isprintable():
        raise UserError(f"model={settings.model!r} names no model; give a folder, or the model's id.")
    for key in ("endpoint", "data", "out"):
        if getattr(settings, key) == "":
            raise UserError(f"{key} is empty; give {key}=..., or leave it out.")
    if settings.scorer not in metrics.SCORERS:
        raise UserError(f"scorer={settings.scorer} is unknown; use {' or '.join(metrics.SCORERS)}.")
    if settings.pictures not in PICTURES:
        raise UserError(f"pictures={settings.pictures} is unknown; use {' or '.join(PICTURES)}.")
    if settings.acceptance is not None:
        acceptance.find(settings.acceptance)
    if unknown := sorted(set(settings.views) - {"full", "crop"}) or ([] if settings.views else ["(none)"]):
        raise UserError(f"views: {unknown[0]} is unknown; use full, crop or both.")
    check_address("endpoint", settings.endpoint)
    check_address("judge.endpoint", settings.judge.endpoint)
    if settings.judge.endpoint and not settings.judge.model:
        raise UserError("judge.endpoint needs judge.model, the name its server knows the judge by.")
    return settings


class Evaluation:
    """One model on some benchmarks."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings, self.console = settings, console
        self.folder = _from_root(settings.out) / model_name(settings.model)
        if (model := _from_root(settings.model)).is_dir():
            settings.model = str(model)
        self.expected = acceptance.find(settings.acceptance) if settings.acceptance else None
        data, official = _from_root(settings.data), settings.pictures == "official"
        self.sets = [benchmark.load(name, data, official) for name in settings.benchmarks]
        for questions in self.sets:
            if not set(settings.views) & set(questions.views):
                raise UserError(f"{questions.name} has no crops; ask for its view full.")
        if len({questions.name for questions in self.sets}) < len(self.sets):
            raise UserError("benchmarks: a name is given twice; records are kept by name.")
        if self.expected and not {questions.name for questions in self.sets} & set(self.expected.benchmarks):
            raise UserError(
                f"acceptance={settings.acceptance} has no figure of these benchmarks; name one of "
                f"{', '.join(self.expected.benchmarks)}."
            )
        self.exclusions = results.read_exclusions([_from_root(p) for p in settings.exclude], self.sets)

    def go(self) -> int:
        """Ask, judge, score and print; 1 if questions are left without an answer, or responses without a verdict, or if
        a published figure is missed."""
        self._say_what_is_uncertain()
        failures = self._ask_all()
        summaries, unjudged = [], list[str]()
        for questions in self.sets:
            folder = self.folder / questions.name
            if not (folder / "records.jsonl").is_file():
                continue
            if self.settings.judge.endpoint:
                unjudged += self._judge(questions, folder)
            summaries.append(self._summarise(questions, folder))
        self.console.print(results.table(summaries, self.folder.name))
        if self.settings.scorer == "official":
            self.console.print(results.side_by_side(summaries))
        if self.settings.speed:
            for result in summaries:
                self.console.print(results.speed(result))
        for sentence in [*failures[:3], *unjudged[:3]]:
            self.console.print(redacted(f"no answer: {one_line(sentence, 500)}"))
        if failures:
            self.console.print(f"{len(failures)} questions got no answer; the same command asks them again.")
        if unjudged:
            counted = " and count as wrong" if self.settings.scorer == "official" else ""
            self.console.print(
                f"{len(unjudged)} responses got no verdict{counted}; the same command asks for them again."
            )
        accepted = self._accepted(summaries)
        return int(bool(failures or unjudged) or not accepted)

    def _say_what_is_uncertain(self) -> None:
        unverified = [questions.name for questions in self.sets if not questions.spec.columns.verified]
        sentences = [remark for questions in self.sets for remark in questions.remarks]
        if unverified:
            sentences.insert(
                0,
                f"{', '.join(unverified)}: nobody here knows the published columns for sure; those that are named are "
                "there, and hold the expected kind of values.",
            )
        for sentence in sentences:
            self.console.print(sentence, markup=False, soft_wrap=True)

    def _accepted(self, summaries: list[dict[str, Any]]) -> bool:
        """Print the comparison with published figures, if one is asked for; whether they are met."""
        if self.expected is None:
            return True
        s = self.settings
        now = {key: getattr(s, key) for key in ("temperature", "thinking", "max_tokens", "scorer")}
        now |= {"model": s.model, "judge": s.judge.model if s.judge.endpoint else None}
        if any(questions.spec.reencoded for questions in self.sets):
            now["pictures"] = s.pictures
        comparison = acceptance.compare(self.expected, summaries)
        self.console.print(acceptance.table(comparison))
        for sentence in [
            *acceptance.differences(self.expected, now, summaries),
            *acceptance.verdict(comparison),
        ]:
            self.console.print(sentence, markup=False, soft_wrap=True)
        return comparison.accepted

    def _ask_all(self) -> list[str]:
        todo = {}
        for questions in self.sets:
            folder = self.folder / questions.name
            self._claim(questions, folder)
            left = asking.missing(
                questions, self.settings.views, self.settings.rows, folder / "records.jsonl"
            )
            if left:
                todo[questions.name] = left
        if not todo:
            self.console.print("every question has its record; nothing is asked")
            return []
        with self._endpoint() as endpoint:
            return asyncio.run(self._ask(endpoint, todo))

    async def _ask(self, endpoint: Endpoint, todo: dict[str, list[Any]]) -> list[str]:
        """One event loop for all benchmarks: a client's connections belong to the loop that opened them."""
        failures: list[str] = []
        for questions in self.sets:
            left, folder = todo.get(questions.name, []), self.folder / questions.name
            if not left:
                continue
            with asking.only_writer(folder), _progress(self.console) as bar:
                line = bar.add_task(results.plain(questions.spec.title), total=len(left))
                advance = partial(bar.advance, line)
                records, at_once = folder / "records.jsonl", self.settings.concurrency
                failures += await asking.ask(endpoint, questions, left, records, at_once, advance)
        return failures

    @contextmanager
    def _endpoint(self) -> Iterator[Endpoint]:
        """The server that was named, or one of our own for as long as the questions last."""
        s = self.settings
        sampling = Sampling(s.thinking, s.temperature, s.top_p, s.max_tokens, s.seed)
        if s.endpoint:
            known = resizing_if_known(s.model), tokens_if_known(s.model)
            yield Endpoint(s.endpoint, s.model, sampling, s.timeout, known[0], tokens=known[1])
            return
        for note in environment_checks.prepare_engine(
            os.environ, ROOT / ".cache", environment_checks.machine("cpu")
        ):
            self.console.print(note, markup=False, soft_wrap=True)
        server.check_model(s.model)
        try:
            processor = model_folder.load_processor(s.model)
            resizing = Resizing(s.model)
        except (OSError, ValueError) as error:
            raise UserError(
                f"model={s.model}: has no processor that can be loaded ({one_line(str(error), 300)})."
            ) from error
        caches.results_folder(self.folder, "out=...")
        log = self.folder / "vllm.log"
        self.console.print(f"starting vLLM (log: {log})", soft_wrap=True)
        with server.started(s.model, s.concurrency, s.seed, s.vllm, log) as socket:
            opens = opens_reasoning(processor, s.thinking)
            tokens = control_tokens.pattern(processor.tokenizer)
            yield Endpoint(server.URL, s.model, sampling, s.timeout, resizing, opens, socket, tokens)

    def _claim(self, questions: benchmark.Questions, folder: Path) -> None:
        """Refuse a folder whose records were answered under other settings; else write the settings down."""
        s = self.settings
        now = {
            "model": model_name(s.model),
            # Two names may share a folder ("a/b" and "a_b"); two folders of weights differ by their hash.
            "name": None if Path(s.model).is_dir() else s.model,
            "model_hash": model_hash(s.model),
            "engine": "endpoint" if s.endpoint else f"vllm {provenance.library_versions()['vllm']}",
            "prompt": questions.spec.prompt + questions.spec.suffix,
            "data": questions.digest(),
            "pictures": questions.pictures,
            **{key: getattr(s, key) for key in ("thinking", "temperature", "top_p", "max_tokens", "seed")},
        }
        made_from = self._made_from(questions)
        file = folder / "settings.json"
        before = _read_settings(file)
        if before is None:
            if foreign := [name for name in WRITTEN if (folder / name).exists()]:
                raise UserError(
                    f"{folder}: holds a {foreign[0]} that no evaluation wrote, for there is no settings.json; give "
                    "another out=..."
                )
        elif (folder / "records.jsonl").is_file():
            # Records made before names were written down have none to compare; pictures were as published then.
            before = {"name": now["name"], "pictures": "published"} | before
            differs = [key for key in ANSWERING if before.get(key) != now[key]]
            if differs:
                key = differs[0]
                raise UserError(
                    f"{folder}: its records were made with {key} {before.get(key)!r}, now {key} is {now[key]!r}; "
                    "give another out=... or remove the folder."
                )
            if why := fingerprint.why(before.get("made_from"), made_from):
                raise UserError(
                    f"{folder}: its records do not match the current inputs: {why}; give another out=... or remove the "
                    "folder."
                )
            return
        caches.results_folder(folder, "out=...")
        more = {"revision": questions.revision, "libraries": provenance.library_versions()}
        more |= {"code": provenance.code_version(ROOT), "made_from": made_from}
        _write(file, now | more)

    def _made_from(self, questions: benchmark.Questions) -> dict[str, str]:
        """What decides an answer beside the settings: the code that asks, the files, this machine's libraries.

        Scoring is not among them: figures are recomputed from the responses each time.
        """
        # vLLM loads the patches for CPUs by name.
        started = ("evaluation/server.py", "backbone/cpu/patches.py")
        own_server = [] if self.settings.endpoint else [ROOT / "vopd" / name for name in started]
        code = fingerprint.files(
            [ROOT / "vopd" / "evaluation" / "endpoint.py", *own_server], but=fingerprint.SCORING
        )
        own = {} if self.settings.endpoint else fingerprint.libraries()
        return {**code, "content of the files": questions.content_hash(), **own}

    def _judge(self, questions: benchmark.Questions, folder: Path) -> list[str]:
        """Ask the judge what the scorer wants to know and no reply is kept of; both scorers' for their table."""
        s, file = self.settings, folder / "judge.jsonl"
        records = read_answers(folder / "records.jsonl").records
        replies = judge.read_replies(file, s.judge.model)
        asks: dict[str, judge.Ask] = {}
        for scorer in metrics.SCORERS if s.scorer == "official" else (s.scorer,):
            read = metrics.parsed(records, questions.spec, scorer)
            wanted = [ask for record in read if (ask := judge.ask_of(record, scorer))]
            asks |= {ask.key: ask for ask in judge.unanswered(wanted, scorer, replies)}
        if not asks:
            return []
        with asking.only_writer(folder), _progress(self.console) as bar:
            line = bar.add_task(f"judge, {results.plain(folder.name)}", total=len(asks))
            return asyncio.run(
                judge.judge(
                    str(s.judge.endpoint), str(s.judge.model), list(asks.values()), file, s.concurrency, s.timeout,
                    lambda: bar.advance(line),
                )
            )  # fmt: skip

    def _summarise(self, questions: benchmark.Questions, folder: Path) -> dict[str, Any]:
        s = self.settings
        replies = judge.read_replies(folder / "judge.jsonl", s.judge.model) if s.judge.endpoint else {}
        result = results.summarise(
            questions,
            read_answers(folder / "records.jsonl"),
            s.scorer,
            s.judge.model if s.judge.endpoint else None,
            replies,
            self.exclusions.get(questions.name),
        )
        _write(folder / "summary.json", result)
        return result


def _read_settings(file: Path) -> dict[str, Any] | None:
    """What an evaluation wrote down, None where there is nothing; UserError for a file that is not of an evaluation."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or {"model", "prompt", "data"} - set(found):
        raise UserError(
            f"{file}: not the settings of an evaluation; give another out=..., or remove it with the records."
        )
    return found


def _write(file: Path, content: dict[str, Any]) -> None:
    """A JSON file that is whole or stays as it was."""
    files.write_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def model_name(model: str) -> str:
    """Folder name of a model: its path below the repository, or its id, with the slashes replaced."""
    path = Path(model)
    if path.is_absolute() and path.is_relative_to(ROOT):
        model = str(path.relative_to(ROOT))
    return model.strip("/").replace("/", "_")


def model_hash(model: str) -> str | None:
    """Hash of a model folder's files; None for a name."""
    return provenance.model_hash(model) if Path(model).is_dir() else None


def _from_root(path: str) -> Path:
    return caches.inside(path)  # an absolute path stays itself


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@reports_errors(interrupted="the same command asks what is missing", kept="what was answered is kept")
def main(overrides: list[str]) -> int:
    """Exit code 0, 1 if questions got no answer or published figures are missed, 2 for bad input, 130 after Ctrl-C."""
    if not overrides or "--help" in overrides or "-h" in overrides:
        print(help_text())
        return 0
    console = Terminal()
    if not console.is_terminal:
        console = Terminal(width=160)
    return Evaluation(settings_of(overrides), console).go()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main(sys.argv[1:]))
