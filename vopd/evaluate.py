"""`python -m vopd.evaluate model=... benchmarks=[...] [key=value ...]`: ask what is missing, score, print the table.

Without `endpoint` vLLM's engine runs in this process. Results land in <out>/<model>/<benchmark>/: records.jsonl (one
line per answer, appended as it arrives), settings.json and summary.json. An interrupted evaluation goes on where it
was; a finished one is only scored again. docs/evaluation.md says what the figures mean.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from yaml import YAMLError

from vopd import provenance
from vopd.errors import UserError
from vopd.evaluation import asking, benchmark, judge, metrics, summary
from vopd.evaluation.benchmark import ROOT
from vopd.evaluation.engines import Endpoint, Engine, LocalEngine, Sampling
from vopd.evaluation.records import read_records
from vopd.redaction import check_address, redacted
from vopd.terminal import Terminal, say

INTERRUPTED = 130
ANSWERING = (
    "model",
    "model_hash",
    "engine",
    "thinking",
    "temperature",
    "top_p",
    "max_tokens",
    "seed",
    "prompt",
    "data",
)


@dataclass
class Judge:
    """An OpenAI-compatible server that judges what the parser could not read; off without an endpoint."""

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
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 32768
    seed: int = 42
    concurrency: int = 64
    timeout: float = 600.0
    rows: int = 0
    data: str = ".cache/benchmarks"
    out: str = "${oc.env:VOPD_RUNS,runs}/evaluation"
    scorer: str = "strict"
    exclude: list[str] = field(default_factory=list)
    judge: Judge = field(default_factory=Judge)
    speed: bool = False
    vllm: dict[str, Any] = field(default_factory=dict)


HELP = """usage: python -m vopd.evaluate model=FOLDER|ID benchmarks=[NAME,...] [key=value ...] [--speed]

model        Hugging Face folder or hub id; with endpoint=... the name the server knows the model by
benchmarks   {known}, or the path of a YAML file
views        full, crop (the latter where a benchmark has crops)
endpoint     OpenAI-compatible server, such as http://localhost:8000/v1; without one vLLM runs in this process
rows         only the first so many questions of each benchmark; 0 is all
data         folder with one folder a benchmark, in the published layout; what is not there is downloaded
scorer       strict, or official: the published rule, its defects included
exclude      exclusion lists (JSON): a second, de-overlapped variant of each figure
judge        endpoint and model of a server that judges what could not be read
speed        print 1 / mean seconds per question (the paper's Figure 6); use concurrency=1 for one at a time
vllm.KEY     further arguments of vLLM's engine, such as vllm.tensor_parallel_size=4

Settings and their defaults:

{settings}"""


def help_text() -> str:
    """Usage and every setting with its default."""
    known = ", ".join(sorted(p.stem for p in benchmark.FOLDER.glob("*.yaml")))
    return HELP.format(known=known, settings=OmegaConf.to_yaml(OmegaConf.structured(Settings)))


def settings_of(words: list[str]) -> Settings:
    """Settings from `key=value` words; UserError for an unknown key, a wrong type or a missing value."""
    words = ["speed=true" if word == "--speed" else word for word in words]
    for word in words:
        if "=" not in word:
            raise UserError(f"'{word}' is not a setting; write key=value (--help lists the keys).")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.from_dotlist(words))
        OmegaConf.resolve(merged)
        missing = sorted(OmegaConf.missing_keys(merged))
        settings: Settings = OmegaConf.to_object(merged) if not missing else Settings()  # type: ignore[assignment]
    except (OmegaConfBaseException, YAMLError) as error:
        key = getattr(error, "full_key", None)
        where = f"{key}: " if key else ""
        raise UserError(f"Setting not understood: {where}{str(error).strip().splitlines()[0]}") from error
    if missing:
        raise UserError(f"The setting '{missing[0]}' has no value; give {missing[0]}=... (--help shows how).")
    if settings.scorer not in metrics.SCORERS:
        raise UserError(f"scorer={settings.scorer} is unknown; use {' or '.join(metrics.SCORERS)}.")
    if unknown := sorted(set(settings.views) - {"full", "crop"}) or ([] if settings.views else ["(none)"]):
        raise UserError(f"views: {unknown[0]} is unknown; use full, crop or both.")
    if settings.concurrency < 1:
        raise UserError("concurrency must be at least 1.")
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
        if (ROOT / settings.model).is_dir():
            settings.model = str(ROOT / settings.model)
        self.sets = [benchmark.load(name, _from_root(settings.data)) for name in settings.benchmarks]
        for questions in self.sets:
            if not set(settings.views) & set(questions.views):
                raise UserError(f"{questions.name} has no crops; ask for its view full.")
        if len({questions.name for questions in self.sets}) < len(self.sets):
            raise UserError("benchmarks: one name stands there twice; records are kept by name.")
        self.exclusions = summary.read_exclusions([_from_root(p) for p in settings.exclude], self.sets)

    def go(self) -> int:
        """Ask, judge, score and print; 1 if questions are left without an answer."""
        failures = self._ask_all()
        summaries = []
        for questions in self.sets:
            folder = self.folder / questions.name
            if not (folder / "records.jsonl").is_file():
                continue
            if self.settings.judge.endpoint:
                self._judge(folder)
            summaries.append(self._summarise(questions, folder))
        self.console.print(summary.table(summaries, self.folder.name))
        if self.settings.speed:
            for result in summaries:
                self.console.print(summary.speed(result))
        for sentence in failures[:3]:
            self.console.print(redacted(f"no answer: {sentence}"))
        if failures:
            self.console.print(f"{len(failures)} questions got no answer; the same command asks them again.")
        return int(bool(failures))

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
        engine = self._engine()
        try:
            return asyncio.run(self._ask(engine, todo))
        finally:
            engine.close()

    async def _ask(self, engine: Engine, todo: dict[str, list[Any]]) -> list[str]:
        """One event loop for all benchmarks: a client's connections belong to the loop that opened them."""
        failures: list[str] = []
        for questions in self.sets:
            left, folder = todo.get(questions.name, []), self.folder / questions.name
            if not left:
                continue
            with asking.only_writer(folder), _progress(self.console) as bar:
                line = bar.add_task(questions.spec.title, total=len(left))
                advance = partial(bar.advance, line)
                records, at_once = folder / "records.jsonl", self.settings.concurrency
                failures += await asking.ask(engine, questions, left, records, at_once, advance)
        return failures

    def _engine(self) -> Engine:
        s = self.settings
        sampling = Sampling(s.thinking, s.temperature, s.top_p, s.max_tokens, s.seed)
        if s.endpoint:
            return Endpoint(s.endpoint, s.model, sampling, s.timeout)
        self.console.print("starting vLLM")
        return LocalEngine(s.model, sampling, s.concurrency, s.vllm)

    def _claim(self, questions: benchmark.Questions, folder: Path) -> None:
        """Refuse a folder whose records were answered under other settings; else write the settings down."""
        s = self.settings
        now = {
            "model": model_name(s.model),
            "model_hash": model_hash(s.model),
            "engine": "endpoint" if s.endpoint else f"vllm {provenance.library_versions()['vllm']}",
            "prompt": questions.spec.prompt + questions.spec.suffix,
            "data": questions.digest(),
            **{key: getattr(s, key) for key in ("thinking", "temperature", "top_p", "max_tokens", "seed")},
        }
        file = folder / "settings.json"
        if (folder / "records.jsonl").is_file():
            before = json.loads(file.read_text()) if file.is_file() else {}
            differs = [key for key in ANSWERING if before.get(key) != now[key]]
            if differs:
                key = differs[0]
                raise UserError(
                    f"{folder}: its records were made with {key} {before.get(key)!r}, now {key} is {now[key]!r}; "
                    "give another out=... or remove the folder."
                )
            return
        folder.mkdir(parents=True, exist_ok=True)
        more = {"revision": questions.revision, "libraries": provenance.library_versions()}
        more["code"] = provenance.code_version(ROOT)
        file.write_text(json.dumps(now | more, indent=1) + "\n")

    def _judge(self, folder: Path) -> None:
        s = self.settings
        records = read_records(folder / "records.jsonl").records
        wanting = [r for r in records if judge.wants_judge(r)]
        with asking.only_writer(folder), _progress(self.console) as bar:
            line = bar.add_task(f"judge, {folder.name}", total=len(wanting))
            asyncio.run(
                judge.judge(
                    str(s.judge.endpoint), str(s.judge.model), records, folder / "judge.jsonl", s.concurrency,
                    s.timeout, lambda: bar.advance(line),
                )
            )  # fmt: skip

    def _summarise(self, questions: benchmark.Questions, folder: Path) -> dict[str, Any]:
        s = self.settings
        verdicts = judge.read_verdicts(folder / "judge.jsonl") if s.judge.endpoint else {}
        result = summary.summarise(
            questions,
            read_records(folder / "records.jsonl"),
            s.scorer,
            f"{s.scorer}, judge {s.judge.model}" if s.judge.endpoint else s.scorer,
            verdicts,
            self.exclusions.get(questions.name),
        )
        (folder / "summary.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        return result


def model_name(model: str) -> str:
    """Folder name of a model: its path below the repository, or its id, with the slashes replaced."""
    path = Path(model)
    if path.is_absolute() and path.is_relative_to(ROOT):
        model = str(path.relative_to(ROOT))
    return model.strip("/").replace("/", "_")


def model_hash(model: str) -> str | None:
    """Hash of a model folder's files; None for a name."""
    folder = Path(model)
    if not folder.is_dir():
        return None
    return provenance.hash_files(
        f for f in folder.iterdir() if f.suffix in (".json", ".safetensors", ".jinja")
    )


def _from_root(path: str) -> Path:
    return ROOT / path  # an absolute path stays itself


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


def main(words: list[str]) -> int:
    """Exit code 0, 1 if questions got no answer, 2 for bad input, 130 after Ctrl-C."""
    if not words or "--help" in words or "-h" in words:
        print(help_text())
        return 0
    console = Terminal()
    if not console.is_terminal:
        console = Terminal(width=160)
    try:
        return Evaluation(settings_of(words), console).go()
    except UserError as error:
        say(f"vopd: {error}")
        return UserError.exit_code
    except KeyboardInterrupt:
        print("vopd: interrupted; the same command asks what is missing.", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main(sys.argv[1:]))
