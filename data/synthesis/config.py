"""Settings of a synthesis: class defaults are the parent paper's, a YAML file and overrides come on top.

"ZwZ" in a comment is arXiv 2602.11858; "ours" marks what the paper does not say.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from data.synthesis import proposers
from vopd.common import yaml_files
from vopd.common.overrides import Tree, check_interpolations
from vopd.common.redaction import check_address
from vopd.errors import UserError

TINY = 1e-9  # for what must be above nothing
MOST_SEED = 2**32 - 1


@dataclass
class Server:
    """An OpenAI-compatible server. The key is read from the environment variable OPENAI_API_KEY, if there is one."""

    base_url: str = "http://127.0.0.1:8000/v1"
    model: str = MISSING
    concurrency: int = 16  # ours, as all below
    timeout_s: float = 120.0
    tries: int = 6
    first_wait_s: float = 1.0  # doubled at each try, with jitter
    longest_wait_s: float = 60.0
    max_tokens: int = 512
    price_in: float = 0.0  # per million tokens, in any one currency
    price_out: float = 0.0


@dataclass
class Propose:
    """Where to look. zero_shot_detection needs `detector`, a model for transformers' pipeline of that name."""

    proposer: str = "opencv"  # ZwZ: SAM3 on objects that a multimodal model lists
    detector: str = ""
    per_image: int = 10  # ours: the best so many regions


@dataclass
class Filter:
    """Which images and regions are worth asking about."""

    min_width: int = 1200  # ZwZ: images larger than 1200 x 1200
    min_height: int = 1200
    min_score: float = 0.75  # ZwZ, of SAM3; the opencv proposer's score is a rank within the image
    max_area: float = 0.1  # ZwZ: area ratio below
    min_side: int = 28  # ours: 56 pixels once enlarged


@dataclass
class Crop:
    """The enlarged region."""

    enlarge: int = 2  # ZwZ, Lanczos
    jpeg_quality: int = 95  # ZwZ


@dataclass
class Ask:
    """Questions about one crop, and the check of each of them."""

    questions: int = 3  # ZwZ
    temperature: float = 0.9  # ZwZ
    top_p: float = 0.8  # ZwZ


@dataclass
class Answer:
    """Answers to one question, and how many must agree."""

    samples: int = 8  # ZwZ
    temperature: float = 0.7  # ZwZ
    consensus: float = 0.75  # ZwZ: at least this share of all samples, unusable ones included


@dataclass
class Box:
    """The red frame in the full image, and the sentence that points at it."""

    expand: float = 0.05  # ZwZ
    width: int = 5  # ZwZ, pixels
    hint: str = "Only look inside the red box."  # ours


@dataclass
class Difficulty:
    """Rows that a small model answers correctly too often from the full image are dropped; no model, no filter."""

    model: str = ""
    base_url: str = ""  # empty: the same server
    samples: int = 4  # ZwZ
    drop_at: int = 2  # ZwZ: correct answers that make a row too easy
    temperature: float = 0.7  # ours


@dataclass
class Transforms:
    """Shares of the rows (0 to 1) that a transform replaces; see data/transforms.py."""

    overlay: float = 0.0
    rendered_text: float = 0.0


@dataclass
class Synthesis:
    """Everything `vopd data synthesize` can be told."""

    images: str = MISSING
    out: str = MISSING
    source: str = MISSING  # what the images are, for the rows' column and the datasheet
    licence: str = MISSING  # theirs
    seed: int = 0
    server: Server = field(default_factory=Server)
    propose: Propose = field(default_factory=Propose)
    filter: Filter = field(default_factory=Filter)
    crop: Crop = field(default_factory=Crop)
    ask: Ask = field(default_factory=Ask)
    answer: Answer = field(default_factory=Answer)
    box: Box = field(default_factory=Box)
    difficulty: Difficulty = field(default_factory=Difficulty)
    transforms: Transforms = field(default_factory=Transforms)


# What may differ when a run is resumed: how requests travel, not what they say.
TRANSPORT = (
    "out",
    "images",
    "server.base_url",
    "server.concurrency",
    "server.timeout_s",
    "server.tries",
    "server.first_wait_s",
    "server.longest_wait_s",
    "server.price_in",
    "server.price_out",
    "difficulty.base_url",
)


_COUNT = (1, 10_000)
_SHARE = (0, 1)
_TEMPERATURE = (0, 2)
_SECONDS = (TINY, 86_400)
BOUNDS = {
    "seed": (0, MOST_SEED),
    "server.concurrency": _COUNT,
    "server.timeout_s": _SECONDS,
    "server.tries": (1, 100),
    "server.first_wait_s": _SECONDS,
    "server.longest_wait_s": _SECONDS,
    "server.max_tokens": (1, 2**20),
    "server.price_in": (0, 1e9),
    "server.price_out": (0, 1e9),
    "propose.per_image": _COUNT,
    "filter.min_width": (1, 2**20),
    "filter.min_height": (1, 2**20),
    "filter.min_score": _SHARE,
    "filter.max_area": _SHARE,
    "filter.min_side": (1, 2**20),
    "crop.enlarge": (1, 16),
    "crop.jpeg_quality": (1, 100),
    "ask.questions": (1, 100),
    "ask.temperature": _TEMPERATURE,
    "ask.top_p": (TINY, 1),
    "answer.samples": (1, 1000),
    "answer.temperature": _TEMPERATURE,
    "answer.consensus": _SHARE,
    "box.expand": (0, 10),
    "box.width": (1, 1000),
    "difficulty.samples": (1, 1000),
    "difficulty.drop_at": (1, 1001),
    "difficulty.temperature": _TEMPERATURE,
    "transforms.overlay": _SHARE,
    "transforms.rendered_text": _SHARE,
}


def load(given: list[str]) -> DictConfig:
    """Settings from an optional YAML file (the first argument) and key=value overrides; raises `UserError`."""
    settings = OmegaConf.structured(Synthesis)
    if given and given[0].endswith((".yaml", ".yml")):
        file, *given = given
        settings = Tree(settings).with_file(Path(file), read(Path(file)))
    config = Tree(settings).override(given)
    _check(config)
    return config


def read(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, whose `${...}` name keys alone; raises `UserError`."""
    content = yaml_files.read(path)
    check_interpolations(str(path), content)
    return content


def _check(config: DictConfig) -> None:
    for key, (least, most) in BOUNDS.items():
        value = OmegaConf.select(config, key)
        if not least <= value <= most:  # NaN too
            low = "more than 0" if least == TINY else f"at least {least:g}"
            raise UserError(f"{key}={value} is not allowed; give a number of {low} and at most {most:.10g}.")
    for key in ("images", "out", "server.model"):
        if not OmegaConf.select(config, key).strip():
            raise UserError(f"{key} is empty; give {key}=...")
    check_address("server.base_url", config.server.base_url)
    check_address("difficulty.base_url", config.difficulty.base_url)
    if config.propose.proposer not in proposers.PROPOSERS:
        known = ", ".join(sorted(proposers.PROPOSERS))
        raise UserError(f"propose.proposer={config.propose.proposer} is unknown; use one of {known}.")
    if config.propose.proposer == "zero_shot_detection" and not config.propose.detector:
        raise UserError("propose.detector has no value; the zero_shot_detection proposer needs a model.")


def differences(first: DictConfig, second: DictConfig) -> list[str]:
    """Keys, TRANSPORT aside, whose values differ."""
    keys = [*_leaves(first), *_leaves(second)]
    return sorted(
        {k for k in keys if k not in TRANSPORT and OmegaConf.select(first, k) != OmegaConf.select(second, k)}
    )


def _leaves(config: DictConfig, prefix: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        found += _leaves(value, f"{name}.") if isinstance(value, DictConfig) else [name]
    return found
