"""What `vopd run` makes of a folder, of kept answers and of checked prompts, without a training process."""

import json
import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vopd.common import caches, fingerprint, provenance
from vopd.errors import UserError
from vopd.evaluation.records import Record, write_records
from vopd.runner import run_fingerprint, supervisor
from vopd.runner.run import Run, main
from vopd.runner.run_folder import RunFolder

ANSWER = Record("a", "digit", "full", "test", "?", "B", 1, False, "B", "B", True)


class Fake:
    """Stands in for the training process: leaves the base model's answers; ends with `code`."""

    def __init__(self) -> None:
        self.code = 0
        self.asked = 0
        self.parts = {"code vopd/views.py": "1", "data": "d"}
        self.answers = {"code vopd/views.py": "1"}

    def train(self, command: list[str], folder: Path, *_: Any) -> supervisor.Outcome:
        if not (folder / "records" / "before.jsonl").exists():
            self.asked += 1
            write_records(folder / "records" / "before.jsonl", [ANSWER])
        if not self.code:
            write_records(folder / "records" / "after.jsonl", [ANSWER])
        (folder / "metrics.jsonl").write_text(
            '{"step": 1, "loss": 0.5, "updates": 1, "skipped_updates": 0}\n'
        )
        return supervisor.Outcome(self.code, 1.0, 1.0, 1.0)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    stand_in = Fake()
    monkeypatch.setenv(caches.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(caches, "_said", set())
    monkeypatch.setattr(run_fingerprint, "of", lambda run: dict(stand_in.parts))
    monkeypatch.setattr(run_fingerprint, "answers", lambda run, views: dict(stand_in.answers))
    monkeypatch.setattr(supervisor, "run", stand_in.train)
    monkeypatch.setattr(Run, "check", lambda self: None)
    monkeypatch.setattr(Run, "prepare_data", lambda self: None)
    monkeypatch.setattr(Run, "_summarise", summarise)
    return stand_in


def summarise(self: Run, outcome: supervisor.Outcome) -> None:
    """Only what is asked about here; the summary itself has tests of its own."""
    (self.folder / "summary.json").write_text(json.dumps({"run": self.origin}))
    (self.folder / "summary.txt").write_text("the result\n")


def start(folder: Path, *overrides: str) -> int:
    return Run("vision_opd", [f"run_dir={folder}", *overrides], Console(quiet=True)).go()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_a_finished_run_answers_for_its_own_inputs_alone(fake: Fake, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert start(folder) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["run"]["fingerprint"] == fake.parts == fingerprint.read(folder)
    assert start(folder) == 0 and fake.asked == 1
    before = contents(folder)
    fake.parts["code vopd/views.py"] = "2"
    with pytest.raises(
        UserError, match=r"other inputs than now: another code vopd/views\.py; give another run_dir"
    ):
        start(folder)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("content", "said"),
    [('{"run": {"code_hash": "x"}}', "is not known"), ('{"run": {"fing', "is not the summary"), ("[]", "is not the")],
)  # fmt: skip
def test_a_finished_run_of_unknown_inputs_is_not_shown(
    fake: Fake, tmp_path: Path, content: str, said: str
) -> None:
    folder = tmp_path / "run"
    start(folder)
    (folder / "summary.json").write_text(content)
    before = contents(folder)
    with pytest.raises(UserError, match=said):
        start(folder)
    assert contents(folder) == before


def test_a_finished_run_without_its_text_is_written_again(fake: Fake, tmp_path: Path) -> None:
    place = Path(__file__).parents[1] / "report" / "synthetic.py"
    spec = spec_from_file_location("synthetic", place)
    assert spec and spec.loader
    synthetic = module_from_spec(spec)
    spec.loader.exec_module(synthetic)
    folder = synthetic.make_run(tmp_path, fixed=0.3, fingerprint=fake.parts)
    RunFolder(folder).write_settings(Run("vision_opd", [f"run_dir={folder}"], Console(quiet=True)).config)
    assert not (folder / "summary.txt").exists()
    assert start(folder) == 0 and fake.asked == 0
    assert "hold-out" in (folder / "summary.txt").read_text()


@pytest.mark.parametrize("begun", ["metrics.jsonl", "rollouts"])
def test_an_unfinished_run_resumes_with_its_own_inputs_alone(fake: Fake, tmp_path: Path, begun: str) -> None:
    folder = tmp_path / "run"
    fake.code = 1
    assert start(folder) == 1
    shutil.move(folder / "metrics.jsonl", folder / begun)
    assert start(folder) == 1  # resumes
    before = contents(folder)
    fake.parts["data"] = "other"
    with pytest.raises(UserError, match="an unfinished run with other inputs than now: another data;"):
        start(folder)
    (folder / fingerprint.FILE).unlink()
    del before[fingerprint.FILE]
    with pytest.raises(UserError, match="is not known"):
        start(folder)
    assert contents(folder) == before


def test_without_an_update_a_fixed_recipe_begins_anew(fake: Fake, tmp_path: Path) -> None:
    """The first start fails in the recipe's own code, after the base model's answers."""
    folder = tmp_path / "run"
    fake.code = 1
    start(folder)
    (folder / "metrics.jsonl").unlink()
    fake.code, fake.parts["recipe module mine.py"] = 0, "fixed"
    assert start(folder) == 0 and fake.asked == 1  # the answers are kept, for they do not depend on it
    assert fingerprint.read(folder) == fake.parts
    (folder / "metrics.jsonl").unlink()
    (folder / "summary.json").unlink()
    fake.parts["code vopd/views.py"] = fake.answers["code vopd/views.py"] = "2"
    assert (
        start(folder) == 0 and fake.asked == 2
    )  # other views: answers of the old ones do not stand beside the new


def test_the_summary_says_what_the_run_was_started_with(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit during the run."""

    def edited(*arguments: Any) -> supervisor.Outcome:
        fake.parts = {"code vopd/views.py": "edited"}
        monkeypatch.setattr(provenance, "code_version", lambda root: "edited")
        return fake.train(*arguments)

    monkeypatch.setattr(supervisor, "run", edited)
    start(tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "summary.json").read_text())["run"]
    assert facts["fingerprint"]["code vopd/views.py"] == "1" and facts["code"] != "edited"


def test_base_answers_are_kept_for_the_next_run_and_asked_anew_for_other_inputs(
    fake: Fake, tmp_path: Path
) -> None:
    assert start(tmp_path / "first") == 0 == start(tmp_path / "second", "seed=1")
    assert fake.asked == 1
    files = [tmp_path / name / "records" / "before.jsonl" for name in ("first", "second", "third")]
    assert files[0].read_bytes() == files[1].read_bytes()
    fake.answers["code vopd/views.py"] = "2"
    assert start(tmp_path / "third") == 0 and fake.asked == 2
    assert files[2].is_file()


def test_a_torn_cache_of_answers_is_made_again(fake: Fake, tmp_path: Path) -> None:
    start(tmp_path / "first")
    (entry,) = (tmp_path / "cache" / "evaluations").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-7])
    assert start(tmp_path / "second") == 0 and fake.asked == 2
    assert entry.read_bytes() == whole


def test_a_cache_that_cannot_be_written_ends_no_run(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file")
    assert start(tmp_path / "first") == 0 == start(tmp_path / "second")
    assert fake.asked == 2
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_a_place_that_cannot_be_written_says_to_set_vopd_runs(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VOPD_RUNS", str(tmp_path / "file"))
    assert main(["vision_opd"]) == 2
    assert "set VOPD_RUNS" in capsys.readouterr().err


def test_prompts_are_checked_again_for_other_views_and_processors(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vopd import prompt_lengths
    from vopd.common import model_folder

    checked: list[str] = []
    parts = {"code vopd/views.py": "1"}
    monkeypatch.setattr(prompt_lengths, "check_prompt_lengths", lambda *a, **k: checked.append("again"))
    monkeypatch.setattr(model_folder, "load_processor", lambda _: None)
    monkeypatch.setattr(Run, "splits", lambda self: ["test"])
    monkeypatch.setattr(Run, "data_hash", lambda self: "d")
    model = ["m"]
    monkeypatch.setattr(Run, "model_hash", lambda self: model[0])
    monkeypatch.setattr(fingerprint, "files", lambda *a, **k: dict(parts))

    def check(*overrides: str) -> int:
        Run("vision_opd", [f"run_dir={tmp_path}", *overrides], Console(quiet=True))._check_prompts()
        return len(checked)

    assert [check(), check()] == [1, 1]
    parts["code vopd/views.py"] = "2"
    assert [check(), check()] == [2, 2]
    model[0] = "another tokenizer"
    assert check() == 3
    assert check("rollout.max_prompt_tokens=99") == 4
    for entry in (tmp_path / "cache" / "checked_prompts").iterdir():
        entry.write_bytes(b"")  # as earlier code left it, and as a full disk does
    assert check() == 5
