"""What a visitor meets first: the README's figures and its method, the community files, the measured figures."""

import csv
import dataclasses
import io
import json
import re
import shlex
import tomllib
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from vopd.config import ROOT, load
from vopd.errors import UserError
from vopd.method import Method, ScoreChunk, UpdateBatch, build
from vopd.report import readme_figures

README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FIGURES = ROOT / "docs" / "figures"
SHOWN = ROOT / "docs" / "results" / "miniature" / "vision_opd" / "seed0"
MEASURED = ROOT / "docs" / "measurements.csv"


# ---- figures --------------------------------------------------------------------------------------------------------


def described(name: str) -> Any:
    """What a committed figure says that it shows."""
    if name.endswith(".png"):
        return json.loads(Image.open(FIGURES / name).text["Description"])  # type: ignore[attr-defined]
    found = ElementTree.parse(FIGURES / name).iter("{http://purl.org/dc/elements/1.1/}description")
    return json.loads(next(iter(found)).text or "")


def labels(name: str) -> list[str]:
    """The texts drawn in a figure: each stands in a comment before its glyphs."""
    return re.findall(r"<!-- (.*?) -->", (FIGURES / name).read_text())


def test_the_readme_shows_both_figures_with_a_description() -> None:
    shown = dict(re.findall(r"!\[([^\]]{40,})\]\((docs/figures/[\w.]+)\)", README))
    assert sorted(shown.values()) == sorted(f"docs/figures/{file.name}" for file in FIGURES.iterdir())


def test_the_example_is_that_of_the_records_and_the_readme_counts_the_others() -> None:
    shown = described("scene.png")
    assert shown == readme_figures.example(SHOWN)
    assert shown["recipe"] == described("gap.svg")["methods"][0]["method"]
    assert f"corrects {shown['fixed']} of the {shown['questions']:,} test questions" in " ".join(
        README.split()
    )
    assert f"and breaks {shown['broken']}." in README


def pixels(file: Path | io.BytesIO) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def test_the_example_is_drawn_as_committed_with_the_pixels_of_the_generator() -> None:
    shown = described("scene.png")
    committed = pixels(FIGURES / "scene.png")
    with matplotlib.rc_context(readme_figures.PLAIN):
        again = readme_figures.file(readme_figures.draw_example(shown), "png", shown)
    assert np.abs(pixels(io.BytesIO(again)) - committed).mean() < 0.1
    scene = readme_figures.scene_of(shown["id"])
    assert scene.question == shown["prompt"]
    for part in (scene.image, scene.crop):
        assert holds(committed, part.astype(int))


def holds(picture: np.ndarray, part: np.ndarray) -> bool:
    """Whether a picture holds a part, enlarged by a whole number, anywhere."""
    for times in range(2, 9):
        enlarged = part.repeat(times, 0).repeat(times, 1)
        first, (height, width) = enlarged[0], enlarged.shape[:2]
        for y, x in np.argwhere((picture == first[0]).all(-1)):
            window = picture[y : y + height, x : x + width]
            if window.shape == enlarged.shape and (window[0] == first).all() and (window == enlarged).all():
                return True
    return False


def test_the_chart_shows_the_accuracies_of_the_records_and_of_the_table() -> None:
    shown = described("gap.svg")
    assert shown == readme_figures.accuracies()
    drawn = labels("gap.svg")
    for row in [{"method": "base (before training)"} | shown["base"], *shown["methods"]]:
        figures = [f"{row['full']:.1f}", f"{row['crop']:.1f}", f"gap {row['gap']:.1f}"]
        assert {row["method"], *figures} <= set(drawn)
        (line,) = re.findall(rf"^\| {re.escape(row['method'])} \|.*", README, re.MULTILINE)
        full, crop, gap = [cell.split()[0] for cell in line.split(" | ")[2:5]]
        assert [full, crop, gap] == [figures[0], figures[1], f"+{row['gap']:.1f}"]


def test_one_answer_counted_otherwise_moves_what_the_chart_is_held_to() -> None:
    kept = readme_figures.answers(SHOWN, "after")
    name, record = next(iter(kept.items()))
    changed = kept | {name: dataclasses.replace(record, correct=not record.correct)}
    before, after = (readme_figures._rounded(readme_figures._rates(rows)) for rows in (kept, changed))
    assert before[record.view] != after[record.view] and before["gap"] != after["gap"]


def test_a_folder_without_records_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path} holds no runs"):
        readme_figures.accuracies(tmp_path)


def test_the_command_writes_the_same_files_twice_and_over_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert readme_figures.main(["--out", str(tmp_path)]) == 0
    first = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert readme_figures.main(["--out", str(tmp_path)]) == 0
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == first
    assert set(first) == {file.name for file in FIGURES.iterdir()}
    (tmp_path / "gap.svg").write_text("<svg>mine</svg>")
    assert readme_figures.main(["--out", str(tmp_path)]) == 2
    assert "gap.svg: was not made by this command" in capsys.readouterr().err
    assert (tmp_path / "gap.svg").read_text() == "<svg>mine</svg>"


# ---- the method in the README ---------------------------------------------------------------------------------------


@pytest.fixture
def method(tmp_path: Path) -> Method:
    """Built from the README's two blocks, written under the names on their first lines."""
    for name, block in re.findall(r"^```(?:python|yaml)\n# (\w+\.\w+)\n(.*?)^```", README, re.DOTALL | re.M):
        (tmp_path / name).write_text(block)
    (recipe,) = tmp_path.glob("*.yaml")
    assert f"scripts/run_recipe.sh {recipe.name}" in README
    config = load(str(recipe), [])
    return build(dict(config.method), Path(config.recipe_folder))


def test_the_readmes_method_is_short_and_says_what_it_is(method: Method) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.M)
    assert sum(bool(line.strip()) for line in block.splitlines()) <= 25
    teacher = method.scorers["teacher"]
    assert (teacher.view, teacher.weights, teacher.rate) == ("crop", "ema", 0.05)
    assert set(method.record()) == {"anchor", "objective", "normalisation", "clip"}


def test_the_readmes_method_scores_the_forward_kl_and_its_loss_has_a_gradient(method: Method) -> None:
    generator = torch.Generator().manual_seed(0)
    student_CV = torch.randn(6, 9, generator=generator).requires_grad_()
    teacher_CV = torch.randn(6, 9, generator=generator)
    tokens_C = torch.zeros(6, dtype=torch.long)
    scored = method.score(ScoreChunk(student_CV, {"teacher": teacher_CV}, tokens_C, {}))
    assert tuple(scored) == method.outputs
    expected_C = torch.nn.functional.kl_div(
        student_CV.log_softmax(-1), teacher_CV.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(scored["divergence"], expected_C)
    per_token = {"divergence": scored["divergence"].view(2, 3)}
    mask_BT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    loss = method.loss(per_token, mask_BT, UpdateBatch(rows=2, tokens=4, ranks=1))
    torch.testing.assert_close(loss, (expected_C[:3].mean() + expected_C[3]) / 2)
    loss.backward()
    assert student_CV.grad is not None and bool((student_CV.grad[:4] != 0).any())
    assert not bool((student_CV.grad[4:] != 0).any())


# ---- community files ------------------------------------------------------------------------------------------------


def missing(command: str) -> list[str]:
    """What a command line of ours names that does not exist: scripts, and tools that no locked package brings."""
    tool, *rest = shlex.split(command)
    if tool == "bash":
        return [] if (ROOT / rest[0]).is_file() else [rest[0]]
    pins = PROJECT["optional-dependencies"]["dev"]
    known = tool.startswith(".venv/bin/") and any(pin.startswith(f"{Path(tool).name}==") for pin in pins)
    return [] if known else [tool]


def test_the_citation_names_this_version_and_the_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(citation)
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert all({"type", "title", "authors"} <= set(work) for work in citation["references"])
    papers = [identifier["value"] for work in citation["references"] for identifier in work["identifiers"]]
    assert [paper for paper in papers if paper.replace(":", " ") not in README] == []


def test_the_changelog_has_this_version_and_changes_to_come() -> None:
    headings = re.findall(
        r"^## (\S+)(?: \((\S+) to (\S+)\))?", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert [name for name, *_ in headings] == ["[Unreleased]", PROJECT["version"]]
    assert date.fromisoformat(headings[1][1]) <= date.fromisoformat(headings[1][2])


def test_the_workflow_runs_the_fast_checks_with_commands_that_exist() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text())
    assert set(workflow["on"]) == {"push", "pull_request"}
    (job,) = workflow["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step and "sudo" not in step["run"]]
    assert [name for command in commands for name in missing(command)] == []
    # The same lines as the script that runs everything.
    script = (ROOT / "scripts" / "test.sh").read_text()
    checks = [command.removeprefix(".venv/bin/") for command in commands if command.startswith(".venv")]
    assert len(checks) == 4
    assert [check for check in checks if f"step {check}\n" not in script] == []
    python = next(
        step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")
    )
    assert PROJECT["requires-python"].startswith(f">={python}")


def test_the_pre_commit_hooks_are_local_and_name_tools_that_exist() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert [name for hook in repository["hooks"] for name in missing(hook["entry"])] == []
    assert {hook["id"] for hook in repository["hooks"]} == {"ruff-check", "ruff-format", "mypy"}
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}


def test_a_command_that_does_not_exist_is_seen() -> None:
    assert missing("bash scripts/nothing.sh") == ["scripts/nothing.sh"]
    assert missing(".venv/bin/black .") == [".venv/bin/black"]


# ---- measurements ---------------------------------------------------------------------------------------------------


def measured() -> list[dict[str, str]]:
    with MEASURED.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_measurement_is_a_whole_line() -> None:
    lines = measured()
    assert list(lines[0]) == "date commit command machine quantity value unit spread note".split()
    for line in lines:
        date.fromisoformat(line["date"])
        assert None not in line and all(
            line[key] for key in ("commit", "command", "machine", "quantity", "unit")
        )
        # A range or a bound alone was recorded where there is no value.
        assert np.isfinite(float(line["value"])) if line["value"] else line["spread"], line
    assert [line["date"] for line in lines] == sorted(line["date"] for line in lines)


def test_the_page_of_measurements_shows_the_latest_lines() -> None:
    lines = measured()
    columns = "quantity value unit spread date commit".split()
    cells = re.findall(
        r"^\| (.* \| 2\d{3}-.*) \|$", (ROOT / "docs" / "measurements.md").read_text(), re.MULTILINE
    )
    assert len(cells) > 30
    for row in cells:
        shown = dict(zip([*columns, "machine"], [cell.strip() for cell in row.split(" | ")], strict=True))
        found = [line for line in lines if all(line[key] == shown[key] for key in columns)]
        assert found and found[0]["machine"].split(":")[0] == shown["machine"], row
        same = [
            line["date"] for line in lines if all(line[k] == found[0][k] for k in ("command", "quantity"))
        ]
        assert max(same) == shown["date"], row
