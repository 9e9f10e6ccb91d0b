"""Every bad input is refused in one sentence that names it; good input passes silently."""

import ast
import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import AutoProcessor

from data import schema
from vopd import prompt_lengths
from vopd.common import environment_checks, images, model_folder
from vopd.errors import UserError
from vopd.runner import preflight
from vopd.views import VIEWS

ROOT = Path(__file__).parents[3]
BASE = ROOT / "data" / "miniature" / "base"
COLUMNS = ("id", "image", "crop", "question")


def refused(check, *args, **kwargs) -> str:
    """The sentence with which `check` refuses, after the rules for such sentences were asserted."""
    with pytest.raises(UserError) as caught:
        check(*args, **kwargs)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def png(width: int = 40, height: int = 24) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_rows(file: Path, count: int, **changed: dict[int, bytes | None]) -> Path:
    """`count` rows of good images but for `changed[column][row]`."""

    def cells(column: str) -> list[dict]:
        return [{"bytes": changed.get(column, {}).get(i, png()), "path": None} for i in range(count)]

    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table(
        {
            "id": [f"row-{i}" for i in range(count)],
            "image": pa.array(cells("image"), image),
            "crop": pa.array(cells("crop"), image),
            "question": ["Which?"] * count,
        }
    )
    pq.write_table(table, file, row_group_size=10)
    return file


def test_disk(tmp_path):
    environment_checks.check_disk(tmp_path / "not" / "yet", 0.0)
    message = refused(environment_checks.check_disk, tmp_path / "not" / "yet", 1e9)
    assert str(tmp_path / "not" / "yet") in message


def test_memory():
    environment_checks.check_memory(0.001, "miniature")
    assert "profile miniature" in refused(environment_checks.check_memory, 1e6, "miniature")


def test_memory_of_a_container_counts(tmp_path):
    (tmp_path / "memory.max").write_text(f"{environment_checks.GIB // 2}\n")
    (tmp_path / "memory.current").write_text(f"{environment_checks.GIB // 2}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {environment_checks.GIB // 4}\n")
    assert environment_checks.available_memory_gib(tmp_path) == pytest.approx(0.25)
    (tmp_path / "memory.max").write_text("max\n")
    assert environment_checks.available_memory_gib(tmp_path) > 0.25


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(BASE, tmp_path / "model")


def test_model_folder(model):
    model_folder.check(model)


def test_missing_model_folder(tmp_path):
    assert str(tmp_path / "absent") in refused(model_folder.check, tmp_path / "absent")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_model_file_missing(model, name):
    (model / name).unlink()
    assert name in refused(model_folder.check, model)


def test_model_without_processor(model):
    (model / "processor_config.json").unlink()
    assert "preprocessor_config.json" in refused(model_folder.check, model)


def test_model_config_is_not_json(model):
    (model / "config.json").write_text("{")
    assert "config.json" in refused(model_folder.check, model)


def test_model_without_weights(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "safetensors" in refused(model_folder.check, model)


@pytest.mark.parametrize("content", [b"version https://git-lfs", b""])
def test_weights_are_no_weights(model, content):
    (model / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refused(model_folder.check, model)


def test_truncated_weights(model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "model.safetensors" in refused(model_folder.check, model)


def test_shard_missing(model):
    (model / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-2.safetensors"}}'
    )
    assert "model-00001-of-2.safetensors" in refused(model_folder.check, model)


def test_parquet(tmp_path):
    preflight.check_parquet(write_rows(tmp_path / "train.parquet", 50), COLUMNS)
    preflight.check_parquet(write_rows(tmp_path / "one.parquet", 1), COLUMNS)


def test_parquet_missing_or_not_parquet(tmp_path):
    assert "absent.parquet" in refused(preflight.check_parquet, tmp_path / "absent.parquet", COLUMNS)
    (tmp_path / "text.parquet").write_text("hello")
    assert "text.parquet" in refused(preflight.check_parquet, tmp_path / "text.parquet", COLUMNS)


def test_parquet_lacks_a_column(tmp_path):
    file = write_rows(tmp_path / "train.parquet", 3)
    message = refused(preflight.check_parquet, file, (*COLUMNS, "answer"))
    assert "train.parquet" in message
    assert "'answer'" in message


def test_parquet_is_empty(tmp_path):
    assert "no row" in refused(preflight.check_parquet, write_rows(tmp_path / "train.parquet", 0), COLUMNS)


def test_a_batch_of_prompts_must_be_there(tmp_path):
    file = write_rows(tmp_path / "train.parquet", 12)
    preflight.check_enough_rows(file, 12)
    message = refused(preflight.check_enough_rows, file, 13)
    assert "has 12 rows, fewer than train.prompts=13" in message


@pytest.mark.parametrize("content", [b"not an image", png()[:100], b"", None])
@pytest.mark.parametrize(("column", "row"), [("image", 0), ("crop", 49)])
def test_image_is_no_image(tmp_path, column, row, content):
    file = write_rows(tmp_path / "train.parquet", 50, **{column: {row: content}})
    message = refused(preflight.check_parquet, file, COLUMNS)
    assert f"{file}: row row-{row}, column {column}" in message


@pytest.mark.parametrize(
    "bound", [(images, "MAX_PIXELS"), (Image, "MAX_IMAGE_PIXELS")], ids=["ours", "pillows"]
)
def test_image_too_large(tmp_path, monkeypatch, bound):
    monkeypatch.setattr(*bound, 100)
    file = write_rows(tmp_path / "train.parquet", 2)
    assert "row row-0, column image" in refused(preflight.check_parquet, file, COLUMNS)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(BASE)


def triplet(name: str, full: tuple[int, int], crop: tuple[int, int], question: str) -> dict:
    return {"id": name, "image": Image.new("RGB", full), "crop": Image.new("RGB", crop), "question": question}


def true_length(row, view, processor) -> int:
    """Length found by processing the pixels, as the rollout does."""
    messages = VIEWS[view](row)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pictures = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
    return len(processor(text=[text], images=pictures)["input_ids"][0])


@pytest.mark.parametrize("view", ["full", "crop"])
def test_prompt_length_is_the_processors(processor, view):
    row = triplet("row-7", (200, 90), (33, 65), "Which is the colour of the thing?\n(A) red\n(B) blue")
    length = true_length(row, view, processor)
    prompt_lengths.check_prompt_lengths([row], processor, length, views=(view,))
    message = refused(prompt_lengths.check_prompt_lengths, [row], processor, length - 1, views=(view,))
    assert "row row-7" in message
    assert f"{length} tokens in the {view} view" in message


def test_each_view_and_row_is_counted(processor):
    small = triplet("small", (32, 32), (32, 32), "Which?")
    long_crop = triplet("long-crop", (32, 32), (200, 200), "Which?")
    limit = true_length(small, "full", processor)
    prompt_lengths.check_prompt_lengths([small] * 300, processor, limit)
    message = refused(prompt_lengths.check_prompt_lengths, [small] * 300 + [long_crop], processor, limit)
    assert "row long-crop" in message
    assert "crop view" in message


@pytest.mark.parametrize("view", ["full", "crop", "noise"])
def test_lengths_from_sizes_are_the_processors(processor, view):
    rng, rows, true = np.random.default_rng(0), [], []
    for i in range(12):
        sizes = rng.integers(20, 500, 4).tolist()
        row = triplet(f"row-{i}", sizes[:2], sizes[2:], "Which? " * int(rng.integers(1, 30)))
        true.append(true_length(row, view, processor))
        rows.append(row | {c: schema.Outline(*row[c].size) for c in schema.IMAGES})
    assert prompt_lengths.prompt_lengths(rows, processor, view, {}) == true


def test_arguments_of_the_template_count(processor):
    row = triplet("row", (64, 64), (64, 64), "Which?")
    template = processor.chat_template
    longer = "{% if wordy %}and some more words{% endif %}"
    try:
        processor.chat_template = template + longer
        plain, wordy = (
            prompt_lengths.prompt_lengths([row], processor, "full", t)[0] for t in ({}, {"wordy": True})
        )
        prompt_lengths.check_prompt_lengths([row], processor, plain, ("full",))
        refused(prompt_lengths.check_prompt_lengths, [row], processor, plain, ("full",), {"wordy": True})
    finally:
        processor.chat_template = template
    assert wordy > plain


# ---- code from a model folder ---------------------------------------------------------------------------------------

EVIL = "from pathlib import Path\nPath(__file__).with_name('was_run').touch()\nclass Any: pass\n"


def change(file: Path, **more: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


@pytest.mark.parametrize("name", ["config", "tokenizer_config", "processor_config", "generation_config"])
def test_code_of_a_models_own_is_refused_and_not_run(model, name, monkeypatch):
    """transformers asks on the terminal whether to run it, which a hasty user answers with y."""
    (model / "evil.py").write_text(EVIL)
    classes = {"AutoConfig": "evil.Any", "AutoProcessor": "evil.Any", "AutoTokenizer": ["evil.Any", None]}
    change(model / f"{name}.json", auto_map=classes, processor_class="Any", model_type="any")
    assert f"{name}.json" in refused(model_folder.check, model)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with contextlib.suppress(OSError, ValueError, KeyError):
        model_folder.load_processor(str(model))
    assert not (model / "was_run").exists()


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", ""]
)
def test_an_index_names_only_safetensors_beside_it(model, name):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert "model.safetensors.index.json" in refused(model_folder.check, model)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_an_index_that_is_none(model, content):
    (model / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refused(model_folder.check, model)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja"])
def test_a_file_of_absurd_size_is_not_read(model, name):
    with (model / name).open("r+b") as file:
        file.truncate(10 * 2**30)  # a hole: it takes no room
    assert name in refused(model_folder.check, model)


def test_a_folder_in_the_place_of_a_file(model):
    (model / "config.json").unlink()
    (model / "config.json").mkdir()
    assert "config.json" in refused(model_folder.check, model)


def test_nothing_of_ours_loads_code_or_pickles():
    """Every auto class is told so, every checkpoint is read as tensors alone, no YAML makes objects.

    The one `exec` runs a class of a module of this repository, which an import would run as well.
    """
    own_code, wrong = ("vopd/method_settings.py", "exec"), []
    for file in sorted(p for folder in ("vopd", "data", "baselines") for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            if (file.relative_to(ROOT).as_posix(), ast.unparse(node.func)) == own_code:
                continue
            called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if (
                (
                    re.fullmatch(r"Auto\w+\.from_pretrained", called)
                    and given.get("trust_remote_code") != "False"
                )
                or (called == "torch.load" and given.get("weights_only") != "True")
                or called in ("pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "eval", "exec")
                or given.get("allow_pickle") == "True"
            ):
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: {called}")
    assert wrong == []


def test_attention_of_a_package_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="flash_attention_2 needs the package flash_attn"):
        preflight.check_attention(True, "flash_attention_2")
    preflight.check_attention(True, "sdpa")
    monkeypatch.setattr(preflight, "find_spec", lambda name: name)
    preflight.check_attention(True, "flash_attention_2")
