"""What a benchmark is, as its YAML file says: read as a stranger's data, and checked before any file is opened.

Aliases and interpolations are refused (the one can unfold without end, the other reads the environment), and so are
names of files that lead out of the benchmark's folder.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vopd.errors import UserError
from vopd.evaluation.scoring import ANSWER_TYPES

BY_GOLD = "by gold"
PAIR = "pair"
MOST_BYTES = 2**16
Content = TypeVar("Content")
PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


@dataclass
class Columns:
    """Names of the columns; `id` lists those that together name a question (none: the row's number).

    verified: a published file has these columns, as `source` says. unique: no two questions share an id; where that is
    not known, repeated ids are numbered at load.
    """

    verified: bool = False
    source: str | None = None
    unique: bool = True
    id: list[str] = field(default_factory=list)
    image: str | None = None
    crop: str | None = None
    question: str = MISSING
    answer: str = MISSING


@dataclass
class Mean:
    """An average over the values of these groups, weighted if weights are given.

    ignore_case, merge_below: values that differ in case alone are one, and so are those that differ only behind
    /`merge_below`/.
    """

    over: list[str] = MISSING
    weights: dict[str, float] = field(default_factory=dict)
    ignore_case: bool = False
    merge_below: str | None = None

    def name(self, value: str) -> str:
        """What a group's value counts as."""
        value = value.lower() if self.ignore_case else value
        if self.merge_below is None:
            return value
        head, found, _ = value.partition(f"/{self.merge_below}/")
        return f"{head}/{self.merge_below}" if found else value


@dataclass
class Metrics:
    """Beside plain accuracy: accuracy per value of a group, averages over groups, pairs, yes/no figures.

    mean, paper_mean: the benchmark's own average, and that of the Vision-OPD paper where it is another. other_gold: ids
    of questions with two options whose gold answer is said to be the wrong one of the two; figures are given for the
    published golds and for the corrected ones.
    """

    per: list[str] = field(default_factory=list)
    mean: Mean | None = None
    paper_mean: Mean | None = None
    pairs: bool = False
    yes_no: bool = False
    other_gold: list[str] = field(default_factory=list)

    def means(self) -> dict[str, Mean]:
        """The averages by the names of their figures."""
        named = {"official mean": self.mean, "paper mean": self.paper_mean}
        return {name: mean for name, mean in named.items() if mean}


@dataclass
class Hub:
    """A data set on the hub. revision: the commit to download, null for the newest; the lock beside the download
    holds the one that was taken."""

    id: str = MISSING
    revision: str | None = None


@dataclass
class Benchmark:
    """One YAML file. `options`: a list column, several columns, or a text column that holds them labelled.

    letters: how many of the questions have a letter as gold, where answer_type is "by gold". reencoded: the paper's
    evaluation sends pictures of this benchmark in another encoding (`reencoding.py`).
    """

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
    letters: int | None = None
    reencoded: bool = False

    def option_columns(self) -> list[str]:
        """The columns that options come from."""
        return [self.options] if isinstance(self.options, str) else list(self.options or [])

    def cluster_columns(self) -> list[str]:
        """The columns whose values together name a cluster."""
        return list(self.cluster) if isinstance(self.cluster, list) else []

    def picture_columns(self) -> list[str]:
        """The columns that the name of a picture's file contains."""
        return PLACEHOLDER.findall(self.pictures or "")


def read(path: Path) -> Benchmark:
    """The description in a YAML file.

    Raises:
        UserError: not readable, a missing, unknown or mistyped key, or an invalid value.
    """
    spec = read_as(Benchmark, path)
    if wrong := _wrong(spec):
        raise UserError(f"{path}: {wrong}.")
    return spec


def read_as(kind: type[Content], path: Path) -> Content:
    """The content of a stranger's YAML file as a dataclass.

    Raises:
        UserError: not readable, or a missing, unknown or mistyped key.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(
                f"{path}: larger than {MOST_BYTES} bytes; it is not a description of a benchmark or of figures."
            )
        text = path.read_text(encoding="utf-8")
        # The parser in C is quick and ends at a thousand levels; OmegaConf's takes a minute for five thousand.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.CSafeLoader)):
            raise UserError(f"{path}: aliases (*name) are not allowed; write the value out.")
        if "${" in text:
            raise UserError(f"{path}: interpolations (${{...}}) are not allowed; write the value out.")
        content = OmegaConf.load(io.StringIO(text))
        merged = OmegaConf.merge(OmegaConf.structured(kind), content)
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise UserError(f"{path}: the key '{missing[0]}' is missing.")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: {said}.") from error


def _wrong(spec: Benchmark) -> str | None:
    """What is invalid, as the rest of a sentence; None if nothing is."""
    columns, metrics = spec.columns, spec.metrics
    for key, names in (
        ("columns.id", columns.id),
        ("groups", list(spec.groups.values())),
        ("metrics.per", metrics.per),
        ("metrics.mean.over", metrics.mean.over if metrics.mean else []),
        ("metrics.paper_mean.over", metrics.paper_mean.over if metrics.paper_mean else []),
        ("metrics.other_gold", metrics.other_gold),
    ):
        if not _are_names(names):
            return f"{key} holds something else than names"
    if spec.options is not None and not isinstance(spec.options, str) and not _are_names(spec.options):
        return "options is neither a column nor a list of columns"
    if spec.cluster not in (None, PAIR) and not _are_names(spec.cluster):
        return f"cluster is neither '{PAIR}' nor a list of columns"
    if spec.answer_type not in (*ANSWER_TYPES, BY_GOLD):
        return (
            f"answer_type '{spec.answer_type}' is unknown; use one of {', '.join((*ANSWER_TYPES, BY_GOLD))}"
        )
    if spec.rows < 0:
        return f"rows={spec.rows} is not a number of questions"
    if not (columns.image or spec.pictures):
        return "it names no pictures; give columns.image or pictures"
    for key, name in (("files", spec.files), ("pictures", spec.pictures or "x")):
        if not name.strip() or leads_out(name):
            return f"{key}: '{name}' leads out of the benchmark's folder; name files inside of it"
    if set("{}") & set(PLACEHOLDER.sub("", spec.pictures or "")):
        return f"pictures: '{spec.pictures}' has braces that hold no column; write {{COLUMN}}"
    return _wrong_metrics(spec)


def _wrong_metrics(spec: Benchmark) -> str | None:
    metrics = spec.metrics
    means = list(metrics.means().values())
    used = [*metrics.per, *(name for mean in means for name in mean.over), *["category"] * metrics.yes_no]
    if absent := [name for name in used if name not in spec.groups]:
        return f"metrics name the group '{absent[0]}', which is not under groups"
    if metrics.pairs and spec.cluster is None:
        return "metrics.pairs needs a cluster"
    for weights in (list(mean.weights.values()) for mean in means):
        if any(not math.isfinite(w) or w < 0 for w in weights) or (weights and not sum(weights)):
            return "metrics.mean.weights must be numbers of at least 0, and not all 0"
    return None


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def leads_out(name: str) -> bool:
    """Whether a file's name, taken below a folder, could lead out of it (links aside), or can be no name at all."""
    path = PurePath(name)
    return path.is_absolute() or ".." in path.parts or "\0" in name
