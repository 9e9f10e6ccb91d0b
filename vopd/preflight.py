"""Checks made before Ray starts, so that a mistake costs a second and one sentence instead of a trace.

Each check takes what it judges and raises `UserError` (exit code 2) naming the file, row or key, or returns
nothing. None of them writes, downloads or loads weights.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
from safetensors import SafetensorError, safe_open

from data import schema
from vopd import chat_template
from vopd.errors import UserError
from vopd.views import VIEWS

GIB = 2**30
# Ray puts <temp>/session_<26 characters of time>_<pid>/sockets/plasma_store into a socket address.
SOCKET_LIMIT_BYTES = 107
RAY_SOCKET_TAIL = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
MASKED_ATTENTION = ("sdpa", "eager")
# Files of a model that name code of its own where it has some.
DESCRIPTIONS = ("config", "tokenizer_config", "processor_config", "preprocessor_config", "generation_config")
MOST_JSON_BYTES = 128 * 2**20  # the largest tokenizers take a quarter
MOST_TEMPLATE_BYTES = 2**20


def check_disk(folder: Path, needed_gb: float) -> None:
    """Refuse when the file system that holds (or will hold) `folder` has less than `needed_gb` (1e9 bytes)."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free_gb = shutil.disk_usage(existing).free / 1e9
    if free_gb < needed_gb:
        raise UserError(
            f"{folder}: {free_gb:.1f} GB free, the run needs {needed_gb:g} GB; "
            "make room or choose another folder."
        )


def available_memory_gib(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Memory that a new process may take, in GiB: the machine's, or the container's (cgroup v2) if less."""
    available = psutil.virtual_memory().available
    limit = cgroup / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        # Cached file pages count as used but are given back on demand.
        used = int((cgroup / "memory.current").read_text()) - int(stat["inactive_file"])
        available = min(available, int(most) - used)
    return available / GIB


def check_memory(needed_gib: float, profile: str) -> None:
    """Refuse when less than `needed_gib` (2**30 bytes) of memory is available to this process."""
    available = available_memory_gib()
    if available < needed_gib:
        raise UserError(
            f"profile {profile}: needs {needed_gib:g} GiB of memory, {available:.1f} GiB are available; "
            "stop other programs or choose a smaller profile."
        )


def check_attention(packed: bool, attention: str) -> None:
    """Padded rows share one copy of a prompt by a mask per row, which not every implementation of attention takes.

    Raises:
        UserError: such a one without packing.
    """
    if not packed and attention not in MASKED_ATTENTION:
        raise UserError(
            f"model.attention={attention} cannot be used with train.packed=false; take "
            f"{' or '.join(MASKED_ATTENTION)}, or train.packed=true."
        )


def check_temp_dir(temp_dir: Path) -> None:
    """Refuse a folder for Ray's session whose path makes its socket addresses too long for Linux."""
    most = SOCKET_LIMIT_BYTES - len(RAY_SOCKET_TAIL)
    if len(os.fsencode(temp_dir.absolute())) > most:
        raise UserError(
            f"{temp_dir.absolute()}: too long for Ray's sockets; use a folder of at most {most} bytes."
        )


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that is not a whole Hugging Face model: config, safetensors, tokenizer, processor, template.

    Also one that names code of its own, which transformers would offer to run, or whose index leads out of it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder; give the folder that holds config.json.")
    for file in (folder / f"{name}.json" for name in DESCRIPTIONS):
        if file.exists() and "auto_map" in _read_json(file):
            raise UserError(
                f"{file}: names code of its own (auto_map), and code from a model folder is never run; take the key "
                "out if transformers knows the model without it."
            )
    processor = folder / "processor_config.json"
    if not processor.exists():
        processor = folder / "preprocessor_config.json"
    tokenizer_config = folder / "tokenizer_config.json"
    for file in (folder / "config.json", folder / "tokenizer.json", tokenizer_config, processor):
        _read_json(file)
    template = folder / "chat_template.jinja"
    if template.exists() and template.stat().st_size > MOST_TEMPLATE_BYTES:
        raise UserError(
            f"{template}: longer than {MOST_TEMPLATE_BYTES} bytes; copy it from the original folder."
        )
    if not template.exists() and "chat_template" not in _read_json(tokenizer_config):
        raise UserError(f"{folder}: no chat_template.jinja; copy it from the model's original folder.")
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="numpy") as weights:
                names = weights.keys()
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{file}: not a whole safetensors file ({error}); "
                "fetch it again (a Git LFS pointer needs `git lfs pull`)."
            ) from error
        if not names:
            raise UserError(f"{file}: holds no tensor; fetch it again.")


def load_processor(model: str) -> Any:
    """The processor of a model folder or hub id; none of its code is run, and its chat template was tried.

    Raises:
        UserError: the template breaks a bound (`vopd/chat_template.py`).
        OSError, ValueError: transformers cannot load it.
    """
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
    chat_template.check(processor.chat_template, model)
    return processor


def check_parquet(
    path: Path, columns: Iterable[str], image_columns: Sequence[str] = schema.IMAGES, sample: int = 16
) -> None:
    """Refuse a split that is unreadable, empty, lacks a column, or holds something that is no image.

    `path` names a parquet file, or shards of it (`data/schema.py`). Images are decoded in `sample` rows spread evenly
    over the split, none above `pictures.MAX_PIXELS`. That every row is as it should be is told by the stamp of
    `data.validate`.
    """
    columns = list(dict.fromkeys(("id", *columns, *image_columns)))
    count = schema.count_rows(path, columns)
    if count == 0:
        raise UserError(f"{path}: holds no row; prepare it again.")
    sample = min(sample, count)
    chosen = {i * count // sample for i in range(sample)} | {count - 1}
    for row in schema.rows_at(path, chosen, ["id", *image_columns]):
        for column in image_columns:
            try:
                schema.decode_image(row[column] or {}, path.parent)
            except UserError as error:
                raise UserError(f"{path}: row {row['id']}, column {column}: {error}") from error


def check_enough_rows(path: Path, prompts: int) -> None:
    """Refuse a training split (a parquet file, or shards of it) that has no whole batch of `prompts` rows."""
    rows = schema.count_rows(path)
    if rows < prompts:
        raise UserError(f"{path}: has {rows} rows, fewer than train.prompts={prompts}; take fewer prompts.")


def check_prompt_lengths(
    rows: Iterable[Mapping[str, Any]],
    processor: Any,
    limit: int,
    views: Sequence[str] = ("full", "crop"),
    template: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Refuse the first row whose prompt, in any of `views`, takes more than `limit` tokens; never truncate.

    Rows, processor and template as in `prompt_lengths`.
    """
    for batch in _batches(rows, 256):
        for view in views:
            lengths = prompt_lengths(batch, processor, view, template)
            for row, length in zip(batch, lengths, strict=True):
                if length > limit:
                    raise UserError(
                        f"row {row['id']}: its prompt takes {length} tokens in the {view} view "
                        f"and the limit is {limit}; raise rollout.max_prompt_tokens or leave the row out."
                    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MOST_JSON_BYTES:
            raise UserError(f"{file}: longer than {MOST_JSON_BYTES} bytes; copy it again.")
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{file}: missing; copy the whole model folder, tokenizer and processor included."
        ) from error
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); copy it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no JSON object; copy it again.")
    return content


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise UserError(f"{index}: has no weight_map that names the files; copy it again.")
        for name in names.values():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(
                    f"{index}: names the file {name[:200]!r}; only *.safetensors files beside it are read."
                )
        files = [folder / name for name in sorted(set(names.values()))]
        absent = [file for file in files if not file.exists()]
        if absent:
            raise UserError(f"{absent[0]}: missing although {index.name} lists it; fetch the whole model.")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no *.safetensors weights (pickled weights are not loaded); convert them.")
    return files


def _batches(rows: Iterable[Mapping[str, Any]], size: int) -> Iterator[list[Mapping[str, Any]]]:
    rest = iter(rows)
    while batch := list(islice(rest, size)):
        yield batch


def prompt_lengths(
    rows: Sequence[Mapping[str, Any]], processor: Any, view: str, template: Mapping[str, Any]
) -> list[int]:
    """Tokens of every row's prompt in a view, as the rollout will make it.

    rows: their images may be `schema.Outline`s, for an image counts as the tokens the processor will put in its place,
    found from its size without its pixels. processor: a Hugging Face processor with a chat template. template: extra
    arguments of that template, e.g. `enable_thinking`.
    """
    texts, images = [], []
    for row in rows:
        messages = VIEWS[view](row)
        texts.append(
            processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template)
        )
        images.append([part["image"] for m in messages for part in m["content"] if part["type"] == "image"])
    sizes = [[image.height, image.width] for of_row in images for image in of_row]
    counts = iter(
        processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"] if sizes else []
    )
    # The template writes one placeholder an image, which the text's own count already holds.
    return [
        len(ids) + sum(next(counts) - 1 for _ in of_row)
        for ids, of_row in zip(processor.tokenizer(texts)["input_ids"], images, strict=True)
    ]
