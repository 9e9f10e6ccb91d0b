"""The skeleton is a recipe that loads, holds to the contract, and whose own test passes and can fail."""

import subprocess
import sys
from pathlib import Path

import pytest

from vopd.config import ROOT, load
from vopd.method import build
from vopd.runner import new_recipe


def run_its_test(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_sharp_eyes.py"]
    return subprocess.run(
        [*command, "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder)],
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_the_skeleton_loads_and_its_own_test_passes_and_can_fail(tmp_path: Path) -> None:
    assert new_recipe.main(["sharp_eyes", "--out", str(tmp_path)]) == 0
    config = load(str(tmp_path / "sharp_eyes.yaml"), ["method.view=noise"])
    method = build(dict(config.method), Path(config.recipe_folder))
    assert method.scorers["teacher"].view == "noise"
    assert set(method.record()) == {"anchor", "objective", "normalisation", "clip"}
    passed = run_its_test(tmp_path)
    assert passed.returncode == 0, passed.stdout + passed.stderr
    module = tmp_path / "sharp_eyes.py"
    module.write_text(module.read_text().replace("teacher_CV - student_CV", "student_CV - teacher_CV"))
    assert run_its_test(tmp_path).returncode == 1


@pytest.mark.parametrize("name", ["Sharp", "sharp-eyes", "class", "2eyes", "../eyes"])
def test_a_name_that_python_cannot_import_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert new_recipe.main([name, "--out", str(tmp_path)]) == 2
    assert f"'{name}' cannot be" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_files_that_exist_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text("# work of weeks\n")
    assert new_recipe.main(["mine", "--out", str(tmp_path)]) == 2
    assert "mine.py exists" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["mine.py"]


def test_nothing_is_written_through_a_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_mine.py").symlink_to(tmp_path / "elsewhere")
    assert new_recipe.main(["mine", "--out", str(tmp_path)]) == 2
    assert "test_mine.py exists" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["test_mine.py"]


def test_a_place_that_cannot_be_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert new_recipe.main(["mine", "--out", str(tmp_path / "file" / "below")]) == 2
    assert "cannot be written to" in capsys.readouterr().err
