"""Every bad input ends a run with exit code 2 and one sentence that names it, before Ray is started."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import validation_stamp
from vopd.common.terminal import Terminal
from vopd.runner import run, supervisor
from vopd.runner.run_folder import RunFolder

Overrides = Callable[..., list[str]]


@pytest.fixture
def refusal(
    tmp_path: Path,
    overrides_for: Overrides,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """`refusal(*overrides)` gives the sentence on stderr of a short run with these overrides."""

    def no_training(*_: object) -> supervisor.Outcome:
        raise AssertionError("training was started")

    monkeypatch.setattr(supervisor, "run", no_training)

    def refused(*overrides: str, recipe: str = "vision_opd") -> str:
        replaced = {override.split("=")[0] for override in overrides}
        kept = [w for w in overrides_for(tmp_path / "run") if w.split("=")[0] not in replaced]
        assert run.main([recipe, *kept, *overrides]) == 2
        said = capsys.readouterr().err
        assert said.startswith("vopd: ") and said.count("\n") == 1, said
        return said

    return refused


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.setps=3"], "setps"),
        (["method.top_kk=3"], "top_kk"),
        (["train.steps=many"], "many"),
        (["method.top_k=many"], "top_k"),
        (["profile=nowhere"], "nowhere"),
        (["model.path=/nowhere/model"], "/nowhere/model"),
        (["data.folder=/nowhere/data"], "/nowhere/data"),
        (["hardware.memory_gib=100000"], "100000 GiB"),
        (["hardware.disk_gib=1e6"], "1e+06 GB"),
        (["rollout.max_prompt_tokens=20"], "the limit is 20"),
        (["model.attention=flash_attention_2"], "on a CPU take sdpa or eager"),
    ],
)
def test_bad_overrides(refusal: Callable[..., str], overrides: list[str], named: str) -> None:
    assert named in refusal(*overrides)


def test_unknown_recipe(refusal: Callable[..., str]) -> None:
    assert "'vision_odp'" in refusal(recipe="vision_odp")


@pytest.fixture
def spoiled(triplets: Path, tmp_path: Path) -> Callable[[Callable[[pa.Table], pa.Table]], Path]:
    """`spoiled(change)` gives a copy of the data in which `change` was applied to the training rows."""

    def make(change: Callable[[pa.Table], pa.Table]) -> Path:
        folder = tmp_path / "spoiled"
        folder.mkdir()
        for file in triplets.glob("*.parquet"):
            table = pq.read_table(file)
            pq.write_table(change(table) if file.stem == "train" else table, folder / file.name)
        return folder

    return make


def test_empty_data(refusal: Callable[..., str], spoiled: Callable[..., Path]) -> None:
    folder = spoiled(lambda table: table.slice(0, 0))
    assert f"{folder / 'train.parquet'}: holds no row" in refusal(f"data.folder={folder}")


def test_missing_column(refusal: Callable[..., str], spoiled: Callable[..., Path]) -> None:
    folder = spoiled(lambda table: table.drop_columns(["question"]))
    assert f"{folder / 'train.parquet'}: no column 'question'" in refusal(f"data.folder={folder}")


def test_data_that_was_not_validated(
    refusal: Callable[..., str], spoiled: Callable[..., Path], triplets: Path
) -> None:
    folder = spoiled(lambda table: table.slice(0, 30))
    assert f"run `vopd data validate {folder}` first" in refusal(f"data.folder={folder}")
    shutil.copyfile(triplets / validation_stamp.NAME, folder / validation_stamp.NAME)
    assert "is not the one that was validated" in refusal(f"data.folder={folder}")


def test_an_image_that_is_none(refusal: Callable[..., str], spoiled: Callable[..., Path]) -> None:
    def spoil(table: pa.Table) -> pa.Table:
        cells = table["crop"].to_pylist()
        cells[-1] = {"bytes": b"no picture", "path": None}
        column = pa.array(cells, table.schema.field("crop").type)
        return table.set_column(table.schema.get_field_index("crop"), "crop", column)

    said = refusal(f"data.folder={spoiled(spoil)}")
    assert "train.parquet: row train-0-000047, column crop" in said


def test_a_folder_with_a_run_of_other_settings(
    refusal: Callable[..., str], overrides_for: Overrides, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    RunFolder(folder).write_settings(run.Run("vision_opd", overrides_for(folder), Terminal()).config)
    (folder / "metrics.jsonl").touch()
    assert "another seed: 0 then, 5 now" in refusal("seed=5")
    assert "another train.lr" in refusal("train.lr=1e-5")
