"""Whether a folder holds a whole Hugging Face model that runs no code of its own, and the processor of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vopd.common import chat_template
from vopd.errors import UserError

# Files of a model that name code of its own where it has some.
DESCRIPTIONS = ("config", "tokenizer_config", "processor_config", "preprocessor_config", "generation_config")
MOST_JSON_BYTES = 128 * 2**20  # the largest tokenizers take a quarter
MOST_TEMPLATE_BYTES = 2**20


def check(folder: Path) -> None:
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
        UserError: the template breaks a bound (`vopd/common/chat_template.py`).
        OSError, ValueError: transformers cannot load it.
    """
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
    chat_template.check(processor.chat_template, model)
    return processor


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
