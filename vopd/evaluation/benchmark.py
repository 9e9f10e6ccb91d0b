"""A benchmark: what its YAML file says (vopd/evaluation/benchmarks/), and its questions read from published files.

The files come from the hub (a snapshot, whose revision is recorded in `lock.json` beside it at the first download
and asked for ever after) or from a local folder in the published layout. Column names that nobody here has read
from a published file are `verified: false`; whether they are there is checked before anything else.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image, UnidentifiedImageError
from yaml import YAMLError

from vopd import caches
from vopd.errors import UserError
from vopd.evaluation.scoring import Parsed, is_correct
from vopd.evaluation.scoring.letters import option_labels
from vopd.evaluation.scoring.numbers import parse_gold_number
from vopd.provenance import hash_contents, hash_json

ROOT = Path(__file__).resolve().parents[2]  # not from vopd.config, which pulls in torch
FOLDER = Path(__file__).parent / "benchmarks"
LOCK = "lock.json"
BY_GOLD = "by gold"
PAIR = "pair"
_READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json"}
_LABEL = re.compile(r"(?:^|(?<=[\s,]))\(?([A-Ha-h])[).:]\s+(?=\S)")


@dataclass
class Columns:
    """Names of the columns; `id` lists those that together name a question (none: the row's number)."""

    verified: bool = False
    id: list[str] = field(default_factory=list)
    image: str | None = None
    crop: str | None = None
    question: str = MISSING
    answer: str = MISSING


@dataclass
class Mean:
    """An official average: the mean over the values of these groups, weighted if weights are given."""

    over: list[str] = MISSING
    weights: dict[str, float] = field(default_factory=dict)


@dataclass
class Metrics:
    """Beside plain accuracy: accuracy per value of a group, an average over groups, pairs, yes/no figures."""

    per: list[str] = field(default_factory=list)
    mean: Mean | None = None
    pairs: bool = False
    yes_no: bool = False


@dataclass
class Hub:
    """A data set on the hub. `revision` stays null here: the lock beside the download holds it."""

    id: str = MISSING
    revision: str | None = None


@dataclass
class Benchmark:
    """One YAML file. `options`: a list column, several columns, or a text column that holds them labelled."""

    title: str = MISSING
    files: str = MISSING
    rows: int = MISSING
    licence: str = MISSING
    columns: Columns = field(default_factory=Columns)
    prompt: str = MISSING
    answer_type: str = MISSING
    official_rule: str = MISSING
    hub: Hub | None = None
    folder: str | None = None
    pictures: str | None = None
    options: Any = None
    groups: dict[str, str] = field(default_factory=dict)
    cluster: Any = None
    suffix: str = ""
    metrics: Metrics = field(default_factory=Metrics)
    lowercase_options: bool = False


@dataclass(frozen=True)
class Question:
    """One question as it is asked and scored; its pictures stay in the file until they are needed."""

    id: str
    row: int
    prompt: str
    options: tuple[str, ...]
    answer: str
    answer_type: str
    groups: Mapping[str, str]
    cluster: str | None


class Questions:
    """The questions of one benchmark, and their pictures on demand."""

    def __init__(
        self, name: str, spec: Benchmark, files: Sequence[Path], folder: Path, revision: str | None
    ) -> None:
        self.name, self.spec, self.revision = name, spec, revision
        self._table, self._files, self._folder = (table := _table(files, spec)), files, folder
        _check_columns(name, spec, table.column_names)
        columns = [c for c in (spec.columns.image, spec.columns.crop) if c]
        self._bare = table.remove_columns(columns)  # without the embedded pictures
        self.questions = [self._question(i, row) for i, row in enumerate(self._bare)]
        _check_ids(name, self.questions)

    @property
    def views(self) -> tuple[str, ...]:
        """The views that can be asked."""
        return ("full", "crop") if self.spec.columns.crop else ("full",)

    def digest(self) -> str:
        """sha256 of what is asked and scored."""
        return hash_json([[q.id, q.prompt, q.answer, q.cluster] for q in self.questions])

    def content_hash(self) -> str:
        """sha256 over the files, and over the pictures that they name."""
        named = (
            [self._folder / self.spec.pictures.format(**row) for row in self._bare]
            if self.spec.pictures
            else []
        )
        return hash_contents([*self._files, *(file for file in named if file.is_file())])

    def picture(self, question: Question, view: str) -> bytes:
        """The encoded picture as published."""
        columns = self.spec.columns
        if self.spec.pictures and view == "full":
            file = self._folder / self.spec.pictures.format(**self._table[question.row])
            if not file.is_file():
                raise UserError(f"{self.name}: question {question.id}: no picture {file}.")
            return file.read_bytes()
        column = columns.crop if view == "crop" else columns.image
        return _bytes(self._table[question.row][column], f"{self.name}: question {question.id}, {column}")

    def _question(self, index: int, row: dict[str, Any]) -> Question:
        spec = self.spec
        answer = str(row[spec.columns.answer]).strip()
        options = _options(spec, row)
        answer_type = _type_of(answer) if spec.answer_type == BY_GOLD else spec.answer_type
        # Str.format would choke on braces in a question; only our two fields are replaced.
        published = row[spec.options] if isinstance(spec.options, str) else None
        shown = published.strip() if isinstance(published, str) else "\n".join(_labelled(options))
        prompt = spec.prompt.replace("{options}", shown)
        prompt = prompt.replace("{question}", str(row[spec.columns.question]).strip())
        if not prompt.endswith(spec.suffix.strip()):
            prompt += spec.suffix
        question = Question(
            id="/".join(str(row[c]) for c in spec.columns.id) or f"{index:05d}",
            row=index,
            prompt=prompt,
            options=tuple(options) if answer_type == "letter" else (),
            answer=answer,
            answer_type=answer_type,
            groups={name: str(row[column]) for name, column in spec.groups.items()},
            cluster=self._cluster(index, row),
        )
        try:
            is_correct(Parsed(None, "unparsed", "check of the gold answer"), answer, answer_type)
        except UserError as error:
            raise UserError(f"{self.name}: question {question.id}: {error}") from error
        return question

    def _cluster(self, index: int, row: dict[str, Any]) -> str | None:
        columns = self.spec.cluster
        if columns is None:
            return None
        if columns == PAIR:
            return str(index // 2)
        values = []
        for column in columns:
            value = self._table[index][column] if column == self.spec.columns.image else row[column]
            picture = column == self.spec.columns.image
            values.append(hashlib.sha256(_bytes(value, column)).hexdigest() if picture else str(value))
        return hash_json(values)[:16]


def find(name: str) -> tuple[str, Benchmark]:
    """Name and description of a benchmark given by name or by the path of a YAML file; UserError if there is none."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise UserError(
            f"There is no benchmark '{name}'; known are {known}, or give the path of a YAML file."
        )
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Benchmark), OmegaConf.load(path))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"{path}: the key '{missing[0]}' is missing.")
        return path.stem, OmegaConf.to_object(merged)  # type: ignore[return-value]
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"{path}: {str(error).strip().splitlines()[0]}") from error


def load(name: str, data: Path) -> Questions:
    """The questions of a benchmark: from its own folder, from `data`/<name>, or downloaded to there.

    Raises:
        UserError: no such benchmark, files or columns; two questions of one id; a gold answer not of its type.
    """
    name, spec = find(name)
    folder = caches.inside(spec.folder) if spec.folder else data / name
    revision = None
    if spec.hub and (not folder.is_dir() or (folder / LOCK).is_file()):
        revision = _download(spec, folder)
    files = sorted(folder.glob(spec.files))
    if not files:
        how = (
            "run `python -m data.miniature.prepare` first" if spec.folder else "put the published files there"
        )
        raise UserError(f"{name}: no files {spec.files} in {folder}; {how}.")
    return Questions(name, spec, files, folder, revision)


def _download(spec: Benchmark, folder: Path) -> str:
    """Fetch the files into `folder` at the revision of the lock, which the first download writes."""
    from huggingface_hub import HfApi, snapshot_download

    assert spec.hub is not None
    lock = folder / LOCK
    if lock.is_file():
        locked = json.loads(lock.read_text())
        if sorted(folder.glob(spec.files)):
            return str(locked["revision"])
        revision = str(locked["revision"])
    else:
        revision = spec.hub.revision or str(HfApi().dataset_info(spec.hub.id).sha)
        folder.mkdir(parents=True)
        lock.write_text(json.dumps({"id": spec.hub.id, "revision": revision}) + "\n")
    patterns = [spec.files] + ([re.sub(r"\{\w+\}", "*", spec.pictures)] if spec.pictures else [])
    snapshot_download(
        spec.hub.id, repo_type="dataset", revision=revision, local_dir=folder, allow_patterns=patterns
    )
    return revision


def _table(files: Sequence[Path], spec: Benchmark) -> Any:
    import datasets

    reader = _READERS.get(files[0].suffix)
    if reader is None:
        raise UserError(f"{files[0]}: a {', '.join(_READERS)} file is expected.")
    datasets.disable_progress_bars()
    extra: dict[str, Any] = {"keep_default_na": False} if reader == "csv" else {}
    if files[0].suffix == ".tsv":
        extra["sep"] = "\t"
    extra["cache_dir"] = str(caches.workspace("datasets", hash_contents(files)))  # as in data/schema.py
    table = datasets.load_dataset(reader, data_files=[str(f) for f in files], split="train", **extra)
    for column in (spec.columns.image, spec.columns.crop):
        if column in table.column_names and isinstance(table.features[column], datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _check_columns(name: str, spec: Benchmark, found: Sequence[str]) -> None:
    columns = spec.columns
    needed = [
        columns.image,
        columns.crop,
        columns.question,
        columns.answer,
        *columns.id,
        *spec.groups.values(),
    ]
    needed += [spec.options] if isinstance(spec.options, str) else list(spec.options or [])
    needed += list(spec.cluster) if isinstance(spec.cluster, list) else []
    wanted = list(dict.fromkeys(c for c in needed if c))
    missing = [c for c in wanted if c not in found]
    if missing:
        why = "" if columns.verified else " (its names were never read from a published file)"
        raise UserError(
            f"{name}: no column {', '.join(map(repr, missing))}; expected are {', '.join(wanted)}, found "
            f"{', '.join(found)}; correct the benchmark's YAML file{why}."
        )


def _check_ids(name: str, questions: Sequence[Question]) -> None:
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise UserError(
                f"{name}: two questions have the id {question.id}; correct columns.id in its YAML file."
            )
        seen.add(question.id)


def _type_of(answer: str) -> str:
    if re.fullmatch(r"\(?[A-H]\)?\.?", answer):
        return "letter"
    return "number" if re.fullmatch(r"[\d.,]+", answer) and parse_gold_number(answer) else "short"


def _options(spec: Benchmark, row: Mapping[str, Any]) -> list[str]:
    """Option texts in order, with their labels if published so; empty ones end the list."""
    if spec.options is None:
        return []
    if isinstance(spec.options, str):
        value = row[spec.options]
        return inline_options(value) if isinstance(value, str) else [str(v).strip() for v in value]
    values = [row[column] for column in spec.options]
    return [str(v).strip() for v in values if v is not None and str(v).strip()]


def _labelled(options: Sequence[str]) -> list[str]:
    """Options as lines "(A) text"; those that carry labels already stay as they are."""
    labels, texts = option_labels(options)
    if texts != list(options):
        return list(options)
    return [f"({label}) {text}" for label, text in zip(labels, texts, strict=False)]


def inline_options(text: str) -> list[str]:
    """Options that a text holds as "(A) red (B) blue", "A: red, B: blue" or on lines "A. red"; [] if none."""
    found: list[re.Match[str]] = []
    for match in _LABEL.finditer(text):
        letter = match[1].upper()
        if letter == "A":
            found = [match]
        elif found and ord(letter) == ord(found[-1][1].upper()) + 1:
            found.append(match)
    if len(found) < 2:
        return []
    ends = [m.start() for m in found[1:]] + [len(text)]
    texts = [text[m.end() : end].strip() for m, end in zip(found, ends, strict=True)]
    return [option.split("\n", 1)[0].strip().rstrip(",;") for option in texts]


def _bytes(value: Any, where: str) -> bytes:
    """Encoded picture from what a cell holds: bytes, a file's bytes in a mapping, or base64 text."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise UserError(f"{where}: holds no picture (bytes or base64 text).") from error


def decode(content: bytes, where: str) -> Image.Image:
    """The picture, RGB; UserError naming the question for a broken one and for one beyond PIL's limit."""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: not a readable picture.") from error
