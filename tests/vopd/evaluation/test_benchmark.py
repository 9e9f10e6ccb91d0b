"""Every benchmark: its YAML file, its published layout, and the way from a question to a scored answer."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from vopd.common import images
from vopd.errors import UserError
from vopd.evaluation import benchmark, evaluate, metrics
from vopd.evaluation.records import read_records

NAMES = sorted(p.stem for p in benchmark.FOLDER.glob("*.yaml"))
OURS = [n for n in NAMES if n.startswith("miniature")]
UNKNOWN = {"pope", "mme_realworld_cn", "mme_realworld_lite"}  # columns
UNPINNED = {*OURS, "hrbench_4k", "hrbench_8k", "mme_realworld_en", "mme_realworld_cn"}
EXPECTED = {  # questions in the fixture, clusters, options of the first question
    "cv_bench": (6, None, 2), "hrbench_4k": (8, 2, 4), "hrbench_8k": (8, 2, 4), "miniature_holdout": (6, None, 4),
    "miniature_test": (6, None, 4), "mme_realworld_cn": (3, None, 5), "mme_realworld_en": (3, None, 5),
    "mme_realworld_lite": (3, None, 5), "mmstar": (4, None, 4), "mmvp": (4, 2, 2), "pope": (12, 2, 0),
    "vstar": (3, None, 4), "zoombench": (3, None, 4),
}  # fmt: skip


@pytest.fixture
def load(
    published: Path, miniature_files: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], benchmark.Questions]:
    original = benchmark.find

    def find(name: str) -> tuple[str, benchmark.Benchmark]:
        name, spec = original(name)
        if spec.folder:
            spec = dataclasses.replace(spec, folder=str(miniature_files))
        return name, spec

    monkeypatch.setattr(benchmark, "find", find)
    return lambda name: benchmark.load(name, published)


def test_all_benchmarks_are_there_and_say_what_is_known() -> None:
    assert sorted(EXPECTED) == NAMES
    for name in NAMES:
        spec = benchmark.find(name)[1]
        assert (spec.hub is None) == (name in OURS)
        revision = spec.hub.revision if spec.hub else None
        assert (revision is None) == (name in UNPINNED)
        assert revision is None or re.fullmatch("[0-9a-f]{40}", revision)
        assert spec.columns.verified == (name not in UNKNOWN)
        assert spec.columns.verified == bool(spec.columns.source)


@pytest.mark.parametrize("name", NAMES)
def test_loads_prompts_answers_and_scores(
    name: str,
    load: Callable[[str], benchmark.Questions],
    stub: Callable[..., Any],
    published: Path,
    tmp_path: Path,
) -> None:
    questions = load(name)
    count, clusters, options = EXPECTED[name]
    first = questions.questions[0]
    assert len(questions.questions) == count
    assert len(first.options) == options
    found = {q.cluster for q in questions.questions}
    assert (len(found) if clusters else found) == (clusters or {None})
    for view in questions.views:
        assert images.decode(questions.picture(first, view), benchmark.PICTURES).width > 8
    gold = {
        q.prompt: q.answer for q in questions.questions[:1]
    }  # the first prompt is answered right, others "A"

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        text = body["messages"][0]["content"][1]["text"]
        return {"text": f"Answer: {gold.get(text, 'A')}"}

    server = stub(answer)
    overrides = [
        "model=stub",
        f"benchmarks=[{name}]",
        f"endpoint={server.url}",
        f"data={published}",
        f"out={tmp_path}",
    ]
    assert evaluate.main(overrides) == 0
    records = read_records(tmp_path / "stub" / name / "records.jsonl").records
    assert len(records) == len(server.asked) == count * len(questions.views)
    right = next(r for r in records if r.id == first.id and r.view == "full")
    assert right.correct and right.prompt == first.prompt
    assert right.details["image_in"][0] > 8
    summary = json.loads((tmp_path / "stub" / name / "summary.json").read_text())
    part = summary["variants"]["full"]["full"]
    assert part["questions"] == count
    assert part["accuracy"]["value"] == pytest.approx(
        sum(r.correct for r in records if r.view == "full") / count
    )
    wanted = questions.spec.metrics
    assert ("pair accuracy" in part, "yes/no" in part) == (wanted.pairs, wanted.yes_no)
    assert (part.get("official mean") is not None) == (wanted.mean is not None)
    assert ("gap" in summary["variants"]["full"]) == (len(questions.views) == 2)


def test_prompts_are_the_published_ones(load: Callable[[str], benchmark.Questions]) -> None:
    suffix = "\nAnswer with the option's letter from the given choices directly."
    prompts = [q.prompt for q in load("vstar").questions]
    assert [p.count(suffix) for p in prompts] == [1, 1, 1]  # added where it is not there yet
    hrbench = load("hrbench_4k").questions[1]
    assert hrbench.prompt == (
        "What is the colour of the car? Select from the following choices.\n(A) blue\n(B) green\n(C) yellow\n(D) red"
    )
    assert load("mme_realworld_cn").questions[0].prompt.endswith("最佳答案为： ")
    english = load("mme_realworld_lite").questions[0].prompt
    assert "listed below:\n(A) red\n(B) blue" in english and english.endswith("The best answer is: ")
    assert load("mmvp").questions[0].prompt == "Is the door open or closed? (a) Open (b) Closed"
    assert load("pope").questions[0].prompt.endswith("?\nAnswer the question using a single word or phrase.")


def test_gold_decides_the_answer_type_where_both_kinds_are_in_one_file(
    load: Callable[[str], benchmark.Questions],
) -> None:
    assert [q.answer_type for q in load("zoombench").questions] == ["letter", "number", "short"]


def test_published_bytes_are_handed_over_unchanged(
    load: Callable[[str], benchmark.Questions], published: Path
) -> None:
    questions = load("mmvp")
    file = published / "mmvp" / "MMVP Images" / "1.jpg"
    assert questions.picture(questions.questions[0], "full") == file.read_bytes()


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("What? (a) Open (b) Closed", ["Open", "Closed"]),
        ("What?\nA. red sign\nB. blue\nAnswer directly.", ["red sign", "blue"]),
        ("Options: A: red, B: blue, C: green", ["red", "blue", "green"]),
        ("Is plan A better?", []),
        ("No options here.", []),
    ],
)
def test_inline_options(text: str, options: list[str]) -> None:
    assert benchmark.inline_options(text) == options


# ---- what can be wrong with files ----------------------------------------------------------------------------------


def rewrite(published: Path, tmp_path: Path, change: Callable[[Any], Any]) -> Path:
    file = tmp_path / "vstar" / "data" / "test-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    change(
        datasets.Dataset.from_parquet(str(next((published / "vstar" / "data").glob("*.parquet"))))
    ).to_parquet(file)
    return tmp_path


def test_a_missing_column_is_an_error_that_names_expected_and_found(published: Path, tmp_path: Path) -> None:
    data = rewrite(published, tmp_path, lambda t: t.rename_column("label", "answer"))
    with pytest.raises(
        UserError, match=r"no column 'label'; expected are .*label.*found .*answer.*second hand"
    ):
        benchmark.load("vstar", data)


def test_two_questions_of_one_id_are_an_error(published: Path, tmp_path: Path) -> None:
    data = rewrite(published, tmp_path, lambda t: datasets.concatenate_datasets([t, t]))
    with pytest.raises(UserError, match="two questions have the id 0"):
        benchmark.load("vstar", data)


def test_a_gold_answer_that_is_no_letter_is_an_error(published: Path, tmp_path: Path) -> None:
    data = rewrite(published, tmp_path, lambda t: t.map(lambda row: {"label": "blue"}))
    with pytest.raises(UserError, match="question 0: Gold answer 'blue'"):
        benchmark.load("vstar", data)


def test_no_files_and_no_benchmark_are_errors(tmp_path: Path) -> None:
    (tmp_path / "vstar").mkdir()
    with pytest.raises(UserError, match=r"no files data/test-\*.parquet"):
        benchmark.load("vstar", tmp_path)
    with pytest.raises(UserError, match="no benchmark 'vsta'; known are cv_bench"):
        benchmark.load("vsta", tmp_path)


def test_the_first_download_records_the_revision_and_later_ones_ask_for_it(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[tuple[str, str]] = []

    def snapshot_download(repo: str, *, revision: str, local_dir: Path, **_: Any) -> None:
        asked.append((repo, revision))
        target = local_dir / "data" / "test-00000-of-00001.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(next((published / "vstar" / "data").glob("*.parquet")).read_bytes())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    pinned: list[str | None] = []
    shas = iter(["abc123", "moved-on"])

    def dataset_info(repo: str, revision: str | None) -> SimpleNamespace:
        pinned.append(revision)
        return SimpleNamespace(sha=next(shas))

    api = SimpleNamespace(dataset_info=dataset_info)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    first = benchmark.load("vstar", tmp_path)
    assert first.revision == "abc123"
    assert pinned == ["b44023b4dca749ed8a76b85eb576627d05a1c174"]
    assert f"of revision abc123, the pinned one is {pinned[0]}" in " ".join(first.remarks)
    lock = tmp_path / "vstar" / "lock.json"
    assert json.loads(lock.read_text()) == {"id": "lmms-lab/vstar-bench", "revision": "abc123"}
    assert benchmark.load("vstar", tmp_path).revision == "abc123"
    assert asked == [("lmms-lab/vstar-bench", "abc123")]
    next((tmp_path / "vstar" / "data").glob("*")).unlink()  # files gone, the lock stays
    assert benchmark.load("vstar", tmp_path).revision == "abc123"
    assert asked[1:] == [("lmms-lab/vstar-bench", "abc123")]


def test_every_metric_group_is_a_group_of_the_benchmark() -> None:
    for name in NAMES:
        spec = benchmark.find(name)[1]
        used = {*spec.metrics.per, *(n for mean in spec.metrics.means().values() for n in mean.over)}
        used |= {"category"} if spec.metrics.yes_no else set()
        assert used <= set(spec.groups), name
    assert metrics.SCORERS == ("strict", "official")
