"""A benchmark's questions, read from published files as its YAML file says (vopd/evaluation/benchmarks/).

The files come from the hub (a snapshot, whose revision is recorded in `lock.json` beside it at the first download
and asked for ever after) or from a local folder in the published layout. Where public code that ran on the published
file names its columns they are `verified: true`; whether they are there is checked before anything else. What else a
description expects of the files (rows, crops, ids) is counted at load, and told in `Questions.remarks`.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import errno
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vopd.common import caches
from vopd.common import images as pictures
from vopd.common.files import write_text
from vopd.common.provenance import hash_contents, hash_json
from vopd.errors import UserError
from vopd.evaluation import description
from vopd.evaluation.description import BY_GOLD, PAIR, Benchmark, leads_out
from vopd.evaluation.reencoding import reencoded
from vopd.evaluation.scoring import Parsed, is_correct
from vopd.evaluation.scoring.letters import option_labels
from vopd.evaluation.scoring.numbers import parse_gold_number

FOLDER = Path(__file__).parent / "benchmarks"
LOCK = "lock.json"
MOST_ROWS = 1_000_000
MOST_OPTIONS = 26
REPEATED = "#"
"""Stands between an id that several questions have and the number of the one that is meant."""
PICTURES = (*pictures.FORMATS, "GIF", "BMP")
"""Formats of published pictures, by Pillow's names."""
_READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json"}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
_LABEL = re.compile(r"(?:^|(?<=[\s,]))\(?([A-Ha-h])[).:]\s+(?=\S)")


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
    has_crop: bool = False

    @property
    def views(self) -> tuple[str, ...]:
        """The views that it can be asked in."""
        return ("full", "crop") if self.has_crop else ("full",)


class Questions:
    """The questions of one benchmark, and their pictures on demand.

    official_pictures: hand over pictures as the paper's evaluation encodes them, where it does (`spec.reencoded`).
    """

    def __init__(
        self,
        name: str,
        spec: Benchmark,
        files: Sequence[Path],
        folder: Path,
        revision: str | None,
        official_pictures: bool = False,
    ) -> None:
        self.name, self.spec, self.revision = name, spec, revision
        self.pictures = "official" if official_pictures and spec.reencoded else "published"
        self._files, self._folder = files, folder
        table = _table(name, files, spec)
        # What is not named is not looked at: reading a cell can mean to open a file that it names.
        self._table = table.select_columns(_check_columns(name, spec, table.features))
        columns = [c for c in (spec.columns.image, spec.columns.crop) if c]
        self._plain = self._table.remove_columns(columns)
        self._crops = _filled(self._table, spec.columns.crop)
        found = [self._question(i, self._row(i)) for i in range(len(self._plain))]
        if not found:
            raise UserError(f"{name}: its files hold no question; get them again.")
        self.questions = found if spec.columns.unique else _numbered(found)
        self._repeated = sum(new.id != old.id for new, old in zip(self.questions, found, strict=True))
        _check_ids(name, self.questions)

    @property
    def views(self) -> tuple[str, ...]:
        """The views that can be asked."""
        return ("full", "crop") if any(self._crops) else ("full",)

    @property
    def remarks(self) -> list[str]:
        """What the files hold otherwise than published, or than could be known beforehand: a sentence each."""
        spec, count = self.spec, len(self.questions)
        found = []
        if count != spec.rows:
            found.append(f"its files hold {count} questions, {spec.rows} are published")
        if spec.letters is not None:
            letters = sum(q.answer_type == "letter" for q in self.questions)
            said = f"{letters} letter and {count - letters} open questions"
            known = (spec.letters, spec.rows - spec.letters)
            same = (letters, count - letters) == known
            found.append(said if same else f"{said}, {known[0]} and {known[1]} are published")
        if spec.columns.crop and not all(self._crops):
            found.append(f"{sum(self._crops)} of {count} questions have a crop; the view crop asks those")
        if self._repeated:
            found.append(
                f"{self._repeated} questions repeat an id; theirs end in {REPEATED}2, {REPEATED}3 and so on"
            )
        pinned = spec.hub.revision if spec.hub else None
        commit = pinned and re.fullmatch("[0-9a-f]{7,40}", pinned)  # a tag or branch is not compared
        if commit and self.revision and not self.revision.startswith(commit[0]):
            found.append(f"its files are of revision {self.revision}, the pinned one is {pinned}")
        return [f"{self.name}: {sentence}." for sentence in found]

    def digest(self) -> str:
        """sha256 of what is asked and scored."""
        return hash_json([[q.id, q.prompt, q.answer, q.cluster] for q in self.questions])

    def content_hash(self) -> str:
        """sha256 over the files, and over the pictures that they name."""
        rows = range(len(self._plain)) if self.spec.pictures else ()
        named = [self._picture_file(index, self._row(index)) for index in rows]
        return hash_contents([*self._files, *(file for file in named if file.is_file())])

    def picture(self, question: Question, view: str) -> bytes:
        """The encoded picture, as published or as the paper's evaluation sends it; PictureError if there is none."""
        content = self._published(question, view)
        return reencoded(content, PICTURES) if self.pictures == "official" else content

    def _published(self, question: Question, view: str) -> bytes:
        columns = self.spec.columns
        if self.spec.pictures and view == "full":
            return pictures.read(self._picture_file(question.row, self._row(question.row)))
        column = str(columns.crop if view == "crop" else columns.image)
        content = self._cell_bytes(question.row, column)
        if not content:
            raise pictures.PictureError(f"is not there: column {column} holds neither bytes nor base64 text.")
        return content

    def _cell_bytes(self, index: int, column: str) -> bytes | None:
        try:
            return _bytes(self._table[index][column])
        except UnicodeDecodeError:  # text it is not
            return None

    def _row(self, index: int) -> dict[str, Any]:
        try:
            return dict(self._plain[index])
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.name}: row {index}: holds text that is not UTF-8; correct the file."
            ) from error

    def _picture_file(self, index: int, row: Mapping[str, Any]) -> Path:
        """The file that holds a question's picture; UserError when its name leads out of the folder."""
        where = f"{self.name}: row {index}"
        name = description.PLACEHOLDER.sub(lambda match: _cell(row, match[1], where), str(self.spec.pictures))
        if leads_out(name) or not _is_inside(self._folder / name, self._folder):
            raise UserError(f"{where}: its picture '{name}' leads out of {self._folder}; correct the row.")
        return self._folder / name

    def _question(self, index: int, row: dict[str, Any]) -> Question:
        spec, where = self.spec, f"{self.name}: row {index}"
        answer = _cell(row, spec.columns.answer, where).strip()
        options = _options(spec, row, where)
        answer_type = _type_of(answer) if spec.answer_type == BY_GOLD else spec.answer_type
        # Str.format would choke on braces in a question; only our two fields are replaced.
        published = row[spec.options] if isinstance(spec.options, str) else None
        shown = published.strip() if isinstance(published, str) else "\n".join(_labelled(options))
        prompt = spec.prompt.replace("{options}", shown)
        prompt = prompt.replace("{question}", _cell(row, spec.columns.question, where).strip())
        if not prompt.endswith(spec.suffix.strip()):
            prompt += spec.suffix
        question = Question(
            id="/".join(_cell(row, c, where) for c in spec.columns.id) or f"{index:05d}",
            row=index,
            prompt=prompt,
            options=tuple(options) if answer_type == "letter" else (),
            answer=answer,
            answer_type=answer_type,
            groups={name: _cell(row, column, where) for name, column in spec.groups.items()},
            cluster=self._cluster(index, row),
            has_crop=self._crops[index],
        )
        if spec.pictures:
            self._picture_file(index, row)
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
            if column != self.spec.columns.image:
                values.append(_cell(row, column, f"{self.name}: row {index}"))
            elif content := self._cell_bytes(index, column):
                values.append(hashlib.sha256(content).hexdigest())
            else:  # a cluster of its own; asking says what is wrong
                values.append(f"row {index}")
        return hash_json(values)[:16]


def find(name: str) -> tuple[str, Benchmark]:
    """Name and description of a benchmark given by name or by the path of a YAML file; UserError if there is none."""
    known = sorted(p.stem for p in FOLDER.glob("*.yaml"))
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_path else FOLDER / f"{name}.yaml"
    if not (path.is_file() if is_path else name in known):
        raise UserError(
            f"There is no benchmark '{name}'; known are {', '.join(known)}, or give the path of a YAML file."
        )
    if path.stem.strip(".") == "":
        raise UserError(f"{path}: its name cannot be the name of a folder of records; rename it.")
    return path.stem, description.read(path)


def load(name: str, data: Path, official_pictures: bool = False) -> Questions:
    """The questions of a benchmark: from its own folder, from `data`/<name>, or downloaded to there.

    official_pictures: as in `Questions`.

    Raises:
        UserError: no such benchmark, files or columns; two questions of one id; a gold answer not of its type.
    """
    name, spec = find(name)
    folder = caches.inside(spec.folder) if spec.folder else data / name
    revision = None
    if spec.hub and (not folder.is_dir() or (folder / LOCK).is_file()):
        revision = _download(spec, folder)
    return Questions(name, spec, _files(name, spec, folder), folder, revision, official_pictures)


def _files(name: str, spec: Benchmark, folder: Path) -> list[Path]:
    """The published files: regular ones of one kind, inside the folder."""
    try:
        files = sorted(folder.glob(spec.files))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: '{spec.files}' is not a file pattern ({error}); correct `files`."
        ) from error
    if not files:
        how = "run `vopd data prepare miniature` first" if spec.folder else "put the published files there"
        raise UserError(f"{name}: no files {spec.files} in {folder}; {how}.")
    for file in files:
        if file.suffix not in _READERS or file.suffix != files[0].suffix:
            raise UserError(f"{file}: a {', '.join(_READERS)} file is expected, and one kind alone.")
        if not file.is_file() or not _is_inside(file, folder):
            raise UserError(f"{file}: no file inside {folder}; copy the file there.")
    return files


def _is_inside(file: Path, folder: Path) -> bool:
    try:
        return file.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a loop of links, a name too long
        return False


def _download(spec: Benchmark, folder: Path) -> str:
    """Fetch the files into `folder` at the revision of the lock, which the first download writes.

    A pinned revision may be short, a tag or a branch; the lock gets the whole commit, which the hub is asked for, as
    `snapshot_download` resolves none itself.
    """
    import httpx
    from huggingface_hub import HfApi, snapshot_download

    assert spec.hub is not None
    lock = folder / LOCK
    try:
        if lock.is_file():
            revision = _locked(lock)
            if sorted(folder.glob(spec.files)):
                return revision
        else:
            revision = str(HfApi().dataset_info(spec.hub.id, revision=spec.hub.revision).sha)
            folder.mkdir(parents=True)
            write_text(lock, json.dumps({"id": spec.hub.id, "revision": revision}) + "\n")
        patterns = [spec.files] + ([description.PLACEHOLDER.sub("*", spec.pictures)] if spec.pictures else [])
        snapshot_download(
            spec.hub.id, repo_type="dataset", revision=revision, local_dir=folder, allow_patterns=patterns
        )
    except (OSError, ValueError, httpx.HTTPError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        pinned = f" at revision {spec.hub.revision}" if spec.hub.revision else ""
        raise UserError(
            f"{spec.hub.id} could not be downloaded{pinned} ({said}); try again, or put the published files into "
            f"{folder}."
        ) from error
    return revision


def _locked(lock: Path) -> str:
    try:
        revision = json.loads(lock.read_text(encoding="utf-8"))["revision"]
    except (ValueError, KeyError, TypeError, RecursionError):
        revision = None
    if not isinstance(revision, str) or not revision:
        raise UserError(
            f"{lock}: holds no revision; remove it to take the newest files, or the whole folder."
        )
    return revision


def _table(name: str, files: Sequence[Path], spec: Benchmark) -> Any:
    import datasets
    import pyarrow as pa

    suffix = files[0].suffix
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it says what we say
    extra: dict[str, Any] = {"keep_default_na": False} if suffix in (".csv", ".tsv") else {}
    if suffix == ".tsv":
        extra["sep"] = "\t"
    extra["cache_dir"] = str(caches.workspace("datasets", hash_contents(files)))  # as in data/schema.py

    def read(some: Sequence[Path]) -> Any:
        return datasets.load_dataset(
            _READERS[suffix], data_files=[str(f) for f in some], split="train", **extra
        )

    unreadable = (
        datasets.exceptions.DatasetsError, pa.ArrowException, OSError, ValueError, TypeError, KeyError, StopIteration,
    )  # fmt: skip
    for file in files if suffix == ".parquet" else ():
        _check_parquet(file)
    at_fault = ", ".join(map(str, files))
    try:
        try:
            table = read(files)
        except unreadable:
            for file in files if len(files) > 1 else ():  # which one it is, unless they do not fit together
                together, at_fault = at_fault, str(file)
                read([file])
                at_fault = together
            raise
    except unreadable as error:
        cause = _bottom(error)
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            raise UserError(
                f"{name}: no room for its files in the cache of the package datasets ({cause.strerror}); make room, or "
                "set HF_HOME to another place."
            ) from error
        raise UserError(
            f"{at_fault}: not readable as {_READERS[suffix]} ({_cause(error)}); get the file again."
        ) from error
    for column in (spec.columns.image, spec.columns.crop):
        if column in table.column_names and isinstance(table.features[column], datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _check_parquet(file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_metadata(file).num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as parquet ({_cause(error)}); get the file again.") from error
    if rows > MOST_ROWS:
        raise UserError(f"{file}: says it holds {rows} rows, more than any benchmark; get the file again.")


def _bottom(error: BaseException) -> BaseException:
    """The root cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _cause(error: BaseException) -> str:
    """The first line of an error's root cause."""
    cause = _bottom(error)
    return (str(cause).strip() or type(cause).__name__).splitlines()[0][:200]


def _check_columns(name: str, spec: Benchmark, features: Mapping[str, Any]) -> list[str]:
    """The columns that the description names; UserError when one is not there or holds another kind of value."""
    columns = spec.columns
    pictures = [c for c in (columns.image, columns.crop) if c]
    plain = [
        columns.answer,
        *columns.id,
        *spec.groups.values(),
        *(c for c in spec.cluster_columns() if c != columns.image),
        *spec.picture_columns(),
    ]
    options = spec.option_columns()
    wanted = list(dict.fromkeys([*pictures, columns.question, *plain, *options]))
    missing = [c for c in wanted if c not in features]
    if missing:
        why = " (its names were never read from a published file)"
        if columns.verified:
            why = f" (its names are from {columns.source or 'a published file'})"
        raise UserError(
            f"{name}: no column {', '.join(map(repr, missing))}; expected are {', '.join(wanted)}, found "
            f"{', '.join(features)}; correct the benchmark's YAML file{why}."
        )
    lists = isinstance(spec.options, str)
    for column, fits, kind in [
        *((c, _holds_pictures, "pictures (bytes or base64 text)") for c in pictures),
        (columns.question, _holds_text, "text"),
        *((c, _holds_plain, "text or numbers") for c in plain),
        *((c, _holds_options if lists else _holds_plain, "the text of options") for c in options),
    ]:
        if not fits(features[column]):
            raise UserError(
                f"{name}: column '{column}' should hold {kind} and holds {features[column]}; correct the file, or the "
                "benchmark's YAML file."
            )
    return wanted


def _dtype(feature: Any) -> str:
    """The type of a column of single values; "" for any other column. Mixed JSON values are looked at row by row."""
    import datasets

    if isinstance(feature, (datasets.ClassLabel, datasets.Json)):
        return "string" if isinstance(feature, datasets.Json) else "int64"
    return str(feature.dtype) if isinstance(feature, datasets.Value) else ""


def _holds_text(feature: Any) -> bool:
    return _dtype(feature) in ("string", "large_string")


def _holds_plain(feature: Any) -> bool:
    return _dtype(feature) not in ("", "null", "binary", "large_binary")


def _holds_options(feature: Any) -> bool:
    import datasets

    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return _holds_plain(feature.feature)
    return _holds_text(feature)


def _holds_pictures(feature: Any) -> bool:
    import datasets

    if isinstance(feature, Mapping):
        return _dtype(feature.get("bytes")) in ("binary", "large_binary")
    binary = _dtype(feature) in ("string", "large_string", "binary", "large_binary")
    return binary or isinstance(feature, datasets.Image)


def _cell(row: Mapping[str, Any], column: str, where: str) -> str:
    """A cell's text; UserError for one that is empty, or holds something else than text or a number."""
    value = row[column]
    plain = isinstance(value, (str, int, float)) and value == value
    if not plain or not str(value).strip() or "\0" in str(value):
        raise UserError(
            f"{where}: {column} holds {value!r:.80}; text or a number is expected, correct the file."
        )
    return str(value)


def _filled(table: Any, column: str | None) -> list[bool]:
    """For each row, whether a column of pictures holds one; none are without a column. Pictures are not read."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if column is None:
        return [False] * len(table)
    values = table.data.column(column)
    if pa.types.is_struct(values.type):
        values = pc.struct_field(values, "bytes")
    return [bool(length) for length in pc.binary_length(values).to_pylist()]


def _numbered(questions: Sequence[Question]) -> list[Question]:
    """The same questions; from the second of an id on, ids end in their number."""
    seen: Counter[str] = Counter()
    found = []
    for question in questions:
        seen[question.id] += 1
        number = seen[question.id]
        own = f"{question.id}{REPEATED}{number}" if number > 1 else question.id
        found.append(dataclasses.replace(question, id=own))
    return found


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


def _options(spec: Benchmark, row: Mapping[str, Any], where: str) -> list[str]:
    """Option texts in order, with their labels if published so; empty ones are left out, as in the official code."""
    if spec.options is None:
        return []
    if isinstance(spec.options, str):
        value = row[spec.options]
        if isinstance(value, str):
            return inline_options(value)
        if not isinstance(value, list):
            raise UserError(f"{where}: {spec.options} holds {value!r:.80}; a list of options is expected.")
        shown = [option for option in value if not (isinstance(option, str) and not option.strip())]
        found = [_cell({spec.options: option}, spec.options, where).strip() for option in shown]
    else:
        values = {column: row[column] for column in spec.options}
        given = [c for c, value in values.items() if value is not None and str(value).strip()]
        found = [_cell(values, column, where).strip() for column in given]
    if len(found) > MOST_OPTIONS:
        raise UserError(f"{where}: has {len(found)} options, more than there are letters; correct the file.")
    return found


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


def _bytes(value: Any) -> bytes | None:
    """Encoded picture from what a cell holds: bytes, a file's bytes in a mapping, or base64 text; None for neither."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (TypeError, ValueError, binascii.Error):
        return None
