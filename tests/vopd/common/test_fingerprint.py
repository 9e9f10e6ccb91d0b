"""One line changed in any input makes another run; another place makes none."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data import schema, validation_stamp
from data.miniature import prepare
from vopd.common import caches, fingerprint, provenance
from vopd.config import ROOT
from vopd.errors import UserError
from vopd.method import final_views
from vopd.runner import run_fingerprint
from vopd.runner.run import Run

YAML = """method:
  module: mine.py
train:
  lr: 1.0e-4
"""
PROFILE = """model:
  path: {model}
data:
  folder: {data}
rollout:
  max_prompt_tokens: 160
  max_response_tokens: 40
  cache_gib: 0.25
"""
METHOD = '''"""A method of the user's own, with all that it may bring along."""
from dataclasses import dataclass
from pathlib import Path

from vopd.method import Method, Scorer

TABLE = Path(__file__).with_name("table.json")


@dataclass
class Settings:
    weights: str = ""


def scaled(x):
    from maths import scale
    return scale * x


def build(settings):
    return Method(outputs=("x",), scorers={"teacher": Scorer("crop", "initial")})
'''


def write_data(folder: Path) -> None:
    """Eight rows a split, one image named by path, and the stamp."""
    (folder / "images").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        rows = list(prepare.rows(split, 2, 0))
        name = f"images/{split}.png"
        (folder / name).write_bytes(rows[0]["image"]["bytes"])
        rows[0]["image"] = {"bytes": None, "path": name}
        schema.write(rows, folder / f"{split}.parquet")
    restamp(folder)


def restamp(folder: Path) -> None:
    """What `data.validate` writes, without its checks."""
    hashes = {path.stem: schema.split_hash(path) for path in schema.splits(folder)}
    validation_stamp.write(folder, dict.fromkeys(hashes, 2), hashes, {})


@dataclass
class Place:
    """A checkout's code, a recipe, a model and data, all of them copies that may be edited."""

    root: Path
    recipe: Path
    model: Path
    data: Path

    def run(self, *overrides: str) -> Run:
        profile = self.recipe / "small.yaml"
        given = [f"profile={profile}", f"model.path={self.model}", f"data.folder={self.data}"]
        return Run(str(self.recipe / "mine.yaml"), [*given, *overrides], Console(quiet=True))

    def now(self, *overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the run is made from, and what the base model's answers are."""
        run = self.run(*overrides)
        answers = run_fingerprint.answers(run, final_views(run.method))
        return {**run_fingerprint.settings(run.config), **run_fingerprint.of(run)}, answers


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Place:
    top = tmp_path_factory.mktemp("original")
    for name in fingerprint.CODE:
        ignored = shutil.ignore_patterns("base", "__pycache__")
        shutil.copytree(ROOT / name, top / "checkout" / name, ignore=ignored)
    losses = top / "checkout" / "baselines" / "opsd_losses.py"
    losses.write_text("from baselines import shared_numbers\nclipped = 1\n")
    losses.with_name("shared_numbers.py").write_text("limit = 1\n")
    recipe = top / "recipe"
    (recipe / "tools").mkdir(parents=True)
    (recipe / "mine.yaml").write_text(YAML)
    (recipe / "small.yaml").write_text(PROFILE.format(model=top / "model", data=top / "data"))
    (recipe / "mine.py").write_text(METHOD)
    (recipe / "maths.py").write_text("from tools import numbers\nscale = 1\n")
    (recipe / "tools" / "__init__.py").write_text("from .more import a\n")
    (recipe / "tools" / "numbers.py").write_text("two = 2\n")
    (recipe / "tools" / "more.py").write_text("a = 1\n")
    (recipe / "table.json").write_text("[1]\n")
    (recipe / "unrelated.py").write_text("x = 1\n")
    (top / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        shutil.copy(ROOT / "data" / "miniature" / "base" / name, top / "model" / name)
    (top / "model" / "model.safetensors").write_bytes(bytes(4096))
    write_data(top / "data")
    return Place(top / "checkout", recipe, top / "model", top / "data")


@pytest.fixture(scope="module")
def before(original: Place) -> tuple[dict[str, Any], dict[str, Any]]:
    """`Place.now` of the original."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "ROOT", original.root)
        patch.setattr(run_fingerprint, "ROOT", original.root)
        return original.now()


@pytest.fixture
def place(original: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A copy with its own times of change; every hash may be remembered, however fresh and small the file."""
    top = original.root.parent
    shutil.copytree(top, tmp_path / "here")
    monkeypatch.setenv(caches.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(provenance, "REMEMBERED_BYTES", 0)
    monkeypatch.setattr(provenance, "SETTLED_SECONDS", -1e6)
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path / "here" / "checkout")
    monkeypatch.setattr(run_fingerprint, "ROOT", tmp_path / "here" / "checkout")
    here = tmp_path / "here"
    return Place(here / "checkout", here / "recipe", here / "model", here / "data")


def swap(file: Path, old: str, new: str) -> None:
    """Another text of the same length in a file that keeps its time of modification."""
    text, times = file.read_text(), file.stat()
    assert old in text and len(old) == len(new)
    file.write_text(text.replace(old, new, 1))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def flip(file: Path, at: int = -100) -> None:
    """Another byte in place."""
    content, times = bytearray(file.read_bytes()), file.stat()
    content[at] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def picture(p: Place) -> None:
    file = p.data / "images" / "train.png"
    flip(file)
    restamp(p.data)


def row(p: Place) -> None:
    rows = list(schema.rows(p.data / "test.parquet"))
    rows[0]["question"] = rows[0]["question"].replace("?", "!")
    schema.write(rows, p.data / "test.parquet")
    restamp(p.data)


def code(name: str) -> Callable[[Place], None]:
    return lambda p: (p.root / name).write_text((p.root / name).read_text() + "# another line\n")


def text(name: str, old: str, new: str) -> Callable[[Place], None]:
    return lambda p: swap(p.recipe / name, old, new)


EDITS: dict[str, tuple[Callable[[Place], Any], str, bool]] = {
    "the recipe's YAML": (text("mine.yaml", "1.0e-4", "2.0e-4"), "train.lr", False),
    "the profile": (text("small.yaml", "tokens: 160", "tokens: 170"), "rollout.max_prompt_tokens", True),
    "the module": (text("mine.py", '("x",)', '("y",)'), "recipe module mine.py", False),
    "a module beside it, imported in a function": (text("maths.py", "1", "2"), "recipe module maths.py", False),
    "a package beside it": (text("tools/numbers.py", "2", "3"), "recipe module tools/numbers.py", False),
    "a relative import": (text("tools/more.py", "1", "2"), "recipe module tools/more.py", False),
    "a file that it names": (text("table.json", "1", "2"), "recipe module table.json", False),
    "a view function": (code("vopd/views.py"), "code vopd/views.py", True),
    "rollout code": (code("vopd/backbone/rollout.py"), "code vopd/backbone/rollout.py", True),
    "the vLLM worker": (code("vopd/backbone/vllm_worker.py"), "code vopd/backbone/vllm_worker.py", True),
    "a correction of vLLM": (code("vopd/backbone/cpu/vllm_blocks.py"), "code vopd/backbone/cpu/vllm_blocks.py", True),
    "the data set": (code("vopd/backbone/dataset.py"), "code vopd/backbone/dataset.py", True),
    "the decoder": (code("data/schema.py"), "code data/schema.py", True),
    "the parser": (
        code("vopd/evaluation/scoring/letters.py"), "code vopd/evaluation/scoring/letters.py", True,
    ),
    "verl's settings": (code("vopd/backbone/verl_cpu.yaml"), "code vopd/backbone/verl_cpu.yaml", True),
    "the model's weights": (lambda p: flip(p.model / "model.safetensors"), "base model", True),
    "the chat template": (lambda p: flip(p.model / "chat_template.jinja"), "base model", True),
    "a row of the data": (row, "data", True),
    "an image that is named by path": (picture, "data", True),
}  # fmt: skip


@pytest.mark.parametrize("what", EDITS)
def test_one_changed_line_makes_another_run_and_says_which(
    place: Place, before: tuple[dict[str, Any], dict[str, Any]], what: str
) -> None:
    edit, name, answers_too = EDITS[what]
    provenance.model_hash(str(place.model))  # remembered as it is now, and so are the images
    schema.split_hash(place.data / "train.parquet")
    edit(place)
    made_from, answers = place.now()
    assert fingerprint.differences(before[0], made_from) == [name]
    assert fingerprint.differences(before[1], answers) == ([name] if answers_too else [])


def test_another_place_and_what_is_not_imported_are_no_difference(
    place: Place, before: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """The recipe, model, data and checkout are copies already."""
    (place.recipe / "unrelated.py").write_text("x = 2\n")
    code("vopd/report/tables.py")(place)
    code("data/synthesis/pipeline.py")(place)
    (place.recipe / "mine.yaml").write_text("# why this rate\n" + YAML)
    overrides = ["run_dir=/elsewhere", "hardware.memory_gib=1", "logging.project=other", "train.save_every=3"]
    assert place.now(*overrides) == before


def test_code_that_a_recipe_takes_from_the_repository_counts(place: Place) -> None:
    swap_in = "from baselines.opsd_losses import clipped\n"
    starts = [place.recipe / "mine.py"]
    (place.recipe / "mine.py").write_text(swap_in)
    before = fingerprint.files(starts, str(place.recipe))
    code("baselines/shared_numbers.py")(place)
    after = fingerprint.files(starts, str(place.recipe))
    assert fingerprint.differences(before, after) == ["code baselines/shared_numbers.py"]


def test_a_package_of_the_user_s_counts_wherever_it_lies(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "elsewhere" / "losses_of_mine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "kl.py").write_text("a = 1\n")
    (place.recipe / "mine.py").write_text("import numpy\nfrom losses_of_mine.kl import a\n")
    monkeypatch.syspath_prepend(str(package.parent))
    found = fingerprint.files([place.recipe / "mine.py"], str(place.recipe))
    own = ["mine.py", "losses_of_mine/__init__.py", "losses_of_mine/kl.py"]
    assert set(found) == {f"recipe module {name}" for name in own}
    assert run_fingerprint.method_files("losses_of_mine.kl", None) == [package / "kl.py"]


def test_libraries_device_and_recordings_count(
    place: Place,
    before: tuple[dict[str, Any], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    known = provenance.version
    monkeypatch.setattr(provenance, "version", lambda name: "9.9" if name == "pillow" else known(name))
    monkeypatch.setattr(run_fingerprint, "device", lambda kind: "a card")
    (tmp_path / "step000001.parquet").write_bytes(b"rollouts")
    now, answers = place.now(f"rollout.replay={tmp_path}")
    assert set(fingerprint.differences(before[0], now)) == {"library pillow", "device", "recording"}
    assert fingerprint.differences(before[1], answers) == ["library pillow", "device"]
    (tmp_path / "step000001.parquet").write_bytes(b"Rollouts")
    assert fingerprint.differences(now, place.now(f"rollout.replay={tmp_path}")[0]) == ["recording"]


def test_a_file_that_a_setting_of_the_method_names_counts(place: Place, tmp_path: Path) -> None:
    (place.recipe / "weights.json").write_text("[1]")
    found = []
    for content in ("[1]", "[2]"):
        (place.recipe / "weights.json").write_text(content)
        found.append(run_fingerprint.settings_files(place.run("method.weights=weights.json").config))
    assert fingerprint.differences(*found) == ["file of method.weights"]


def test_an_image_that_was_changed_in_place_must_be_validated_again(place: Place) -> None:
    place.run().data_hash()
    flip(place.data / "images" / "test.png")
    with pytest.raises(UserError, match="'test' is not the one that was validated"):
        place.run().data_hash()


def test_settings_of_verl_make_other_answers(place: Place) -> None:
    answers = [
        run_fingerprint.answers(place.run(*overrides), ["full"])
        for overrides in (
            [],
            ["verl.actor_rollout_ref.rollout.dtype=bfloat16"],
            ["rollout.max_batch=3"],
            ["seed=3"],
        )
    ]
    assert answers[1] != answers[0] != answers[2] and answers[3] == answers[0]


def test_views_of_the_users_own_bring_their_module_along(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(run_fingerprint.VIEWS, "mine", lambda row: [])
    found = run_fingerprint.answers(place.run(), ["full", "mine"])
    assert "recipe module mine.py" in found
    assert "recipe module mine.py" not in run_fingerprint.answers(place.run(), ["full"])


def test_what_is_recorded_can_be_read_and_what_is_torn_is_not_known(tmp_path: Path) -> None:
    assert fingerprint.read(tmp_path) is None
    fingerprint.write(tmp_path, {"data": "1", "code vopd/views.py": "2"})
    recorded = fingerprint.read(tmp_path)
    assert recorded == {"data": "1", "code vopd/views.py": "2"}
    assert fingerprint.why(recorded, recorded) == ""
    assert fingerprint.why(recorded, {"data": "3"}) == "another data (and 1 more: code vopd/views.py)"
    for torn in ('{"data": "1', "[]", "\xff"):
        (tmp_path / fingerprint.FILE).write_text(torn)
        assert fingerprint.read(tmp_path) is None
    assert fingerprint.why(None, recorded) == fingerprint.UNKNOWN == fingerprint.why({}, recorded)


def test_every_part_can_be_kept_as_json_without_a_place(place: Place) -> None:
    written = json.dumps(run_fingerprint.of(place.run()))
    assert str(place.root.parent) not in written and str(ROOT) not in written


def test_an_unchanged_data_set_reads_new_rows_under_the_old_time(place: Place) -> None:
    """The library behind the data set knows files by path and time alone."""
    file = place.data / "test.parquet"
    os.utime(file, (1e9, 1e9))
    assert len(schema.encoded([file])) == 2
    rows = list(schema.rows(file))
    rows[0]["question"] += " Say it."
    schema.write(rows, file)
    os.utime(file, (1e9, 1e9))
    assert schema.encoded([file])[0]["question"].endswith(" Say it.")
