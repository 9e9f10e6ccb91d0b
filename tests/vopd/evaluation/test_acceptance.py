"""`acceptance=NAME`: both sides of the line, what is missing, and the notice of other settings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.vopd.evaluation import conftest as layouts
from vopd.errors import UserError
from vopd.evaluation import acceptance, evaluate

Start = Callable[..., Any]
QWEN = acceptance.find("qwen3_5_4b")


def made_up(off: float = 0.0, **offs: float) -> list[dict[str, Any]]:
    """Summaries of every benchmark, whose figures differ from the paper's by `off` points, or by those of `offs`."""
    found = []
    for name, published in QWEN.benchmarks.items():
        value = (published.paper + offs.get(name, off)) / 100
        group, key = acceptance.FIGURES[published.figure]
        part = {"questions": 20, "accuracy": {"value": 0.01}, group: {key: value}}
        found.append(
            {
                "benchmark": name, "title": published.title, "rows_found": 20, "rows_published": 20,
                "variants": {"full": {"full": part}},
            }
        )  # fmt: skip
    return found


def outside(summaries: list[dict[str, Any]]) -> dict[str, float]:
    comparison = acceptance.compare(QWEN, summaries)
    assert comparison.accepted == (not comparison.outside)
    return {row.title: row.difference for row in comparison.outside}


@pytest.mark.parametrize("name", sorted(QWEN.benchmarks))
@pytest.mark.parametrize("side", [-1, 1])
def test_five_points_are_accepted_and_just_over_is_not(name: str, side: int) -> None:
    title = QWEN.benchmarks[name].title
    assert outside(made_up(**{name: side * 5.0})) == {}
    assert outside(made_up(**{name: side * 5.01})) == {title: side * 5.01}


@pytest.mark.parametrize("side", [-1, 1])
def test_three_points_in_the_mean_are_accepted_and_just_over_is_not(side: int) -> None:
    assert outside(made_up(side * 3.0)) == {}
    assert outside(made_up(side * 3.01)) == {"mean": side * 3.01}
    assert (
        outside(made_up(side * 3.01, vstar=-side * 3.0)) == {}
    )  # none of them is out, and the mean is not either


def test_the_mean_waits_for_every_benchmark_and_what_is_missing_is_named() -> None:
    summaries = made_up(-4.0)
    assert outside(summaries) == {"mean": -4.0}
    summaries[0]["rows_found"] = 21
    summaries[1]["variants"]["full"] = {"crop": {}}
    del summaries[2]
    comparison = acceptance.compare(QWEN, summaries)
    assert comparison.accepted and comparison.mean is None
    said = " ".join(acceptance.verdict(comparison))
    assert "V* is not finished: 20 of 21 questions have a figure; ZoomBench is not evaluated" in said
    assert "HR-Bench 4K is not evaluated" in said and "The mean is not judged" in said
    assert said.endswith("accepted, by 7 of 10 benchmarks.")
    assert not acceptance.compare(QWEN, []).accepted


def test_what_is_out_is_named_with_its_distance() -> None:
    said = list(acceptance.verdict(acceptance.compare(QWEN, made_up(-3.5, mmstar=6.5))))
    assert said[0] == (
        "out of acceptance: MMStar is 85.03, 6.50 points above the paper's 78.53; 5 are accepted."
    )
    assert said[-1] == "NOT accepted, by 10 of 10 benchmarks."
    (mean,) = [s for s in acceptance.verdict(acceptance.compare(QWEN, made_up(-3.5))) if "mean" in s]
    assert "3.50 points below" in mean and "3 are accepted" in mean


def test_another_setting_or_set_is_told_and_the_stated_ones_are_not() -> None:
    stated = {
        "model": "Qwen/Qwen3.5-4B", "temperature": 0.0, "thinking": False, "max_tokens": 32768, "scorer": "official",
        "judge": "openai/gpt-oss-120b", "pictures": "official",
    }  # fmt: skip
    assert list(acceptance.differences(QWEN, stated, made_up())) == []
    del stated["pictures"]  # of a set that has no pictures of its own encoding
    assert list(acceptance.differences(QWEN, stated, made_up())) == []
    changes = {"model": "mine", "temperature": 0.7, "thinking": True, "max_tokens": 1024, "scorer": "strict"}
    changes |= {"judge": None, "pictures": "published"}
    for key, value in changes.items():
        (sentence,) = acceptance.differences(QWEN, stated | {key: value}, made_up())
        assert sentence.startswith(f"another setting: {key} is ")
    summaries = made_up()
    summaries[0]["rows_published"] = 191
    assert list(acceptance.differences(QWEN, stated, summaries)) == [
        "another set: V* has 20 questions here, 191 as published."
    ]


# ---- the command ---------------------------------------------------------------------------------------------------


def figures_file(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = yaml.safe_load((acceptance.FOLDER / "qwen3_5_4b.yaml").read_text())
    change(content)
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture
def twenty(tmp_path: Path) -> Path:
    """V* of 20 questions in its published layout, the answer to each is A."""
    rows = [
        {"image": {"bytes": layouts.picture(i), "path": None}, "text": f"What is {i}?\n(A) red\n(B) blue", "label": "A",
         "question_id": str(i), "category": "direct_attributes"}
        for i in range(20)
    ]  # fmt: skip
    layouts.parquet(tmp_path / "data" / "vstar" / "data" / "test-0.parquet", rows, ("image",))
    return tmp_path / "data"


@pytest.mark.parametrize(("paper", "code"), [(75.0, 0), (74.99, 1), (85.0, 0), (85.01, 1)])
def test_the_command_ends_with_1_when_a_figure_is_out(
    paper: float, code: int, stub: Start, twenty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def only_vstar(content: dict[str, Any]) -> None:
        content["benchmarks"] = {"vstar": content["benchmarks"]["vstar"] | {"paper": paper}}
        content["points_mean"] = 6.0

    def answer(body: dict[str, Any]) -> dict[str, Any]:  # 16 of 20 are right
        text = body["messages"][0]["content"][-1]["text"]
        return {"text": "B" if any(f"What is {i}?" in text for i in range(4)) else "A"}

    server = stub(answer)
    arguments = [
        "model=stub",
        "benchmarks=[vstar]",
        f"endpoint={server.url}",
        f"data={twenty}",
        f"out={tmp_path}",
    ]
    assert evaluate.main(arguments) == 0
    before = (tmp_path / "stub" / "vstar" / "records.jsonl").read_bytes()
    capsys.readouterr()
    file = figures_file(tmp_path, only_vstar)
    assert evaluate.main([*arguments, f"acceptance={file}"]) == code
    shown = capsys.readouterr().out
    assert ("out of acceptance: V* is 80.00, 5.01 points" in shown) == bool(code)
    assert f"{'NOT accepted' if code else 'accepted'}, by 1 of 1 benchmarks." in shown
    assert "another setting: scorer is strict, the published figures are for official." in shown
    assert "another setting: judge is none" in shown and "another setting: pictures is published" in shown
    assert "another setting: temperature" not in shown
    assert "another set: V* has 20 questions here, 191 as published." in shown
    assert len(server.asked) == 20  # a finished evaluation is only compared
    assert (tmp_path / "stub" / "vstar" / "records.jsonl").read_bytes() == before


def test_the_shipped_figures_by_their_name(
    stub: Start, twenty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = stub(lambda body: {"text": "A"})
    arguments = [
        "model=stub",
        "benchmarks=[vstar]",
        f"endpoint={server.url}",
        f"data={twenty}",
        f"out={tmp_path}",
    ]
    assert evaluate.main([*arguments, "acceptance=qwen3_5_4b"]) == 1
    shown = capsys.readouterr().out
    assert "V* is 100.00, 15.71 points above the paper's 84.29" in shown and "82.72" in shown
    assert "not compared: ZoomBench is not evaluated; HR-Bench 4K is not evaluated" in shown
    summary = json.loads((tmp_path / "stub" / "vstar" / "summary.json").read_text())
    assert summary["variants"]["full"]["full"]["accuracy"]["value"] == 1.0


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            ["benchmarks=[vstar]", "acceptance=qwen"],
            "acceptance=qwen: there are no such figures; known are qwen3_5_4b",
        ),
        (["benchmarks=[vstar]", "acceptance=none.yaml"], "there are no such figures"),
        (["benchmarks=[vstar]", "pictures=png"], "pictures=png is unknown"),
        (
            ["benchmarks=[mmstar]", "acceptance={file}"],
            "has no figure of these benchmarks; name one of vstar",
        ),
    ],
)
def test_bad_names_end_with_2_before_anything_is_asked(
    given: list[str],
    sentence: str,
    stub: Start,
    published: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = figures_file(tmp_path, lambda c: c.update(benchmarks={"vstar": c["benchmarks"]["vstar"]}))
    server = stub(lambda body: {"text": "A"})
    more = [word.format(file=file) for word in given]
    assert (
        evaluate.main(["model=stub", f"endpoint={server.url}", f"data={published}", f"out={tmp_path}", *more])
        == 2
    )
    assert sentence in capsys.readouterr().err
    assert server.asked == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["benchmarks"]["vstar"].update(figure="best"), "vstar: figure 'best' is unknown"),
        (lambda c: c["benchmarks"]["vstar"].update(paper=842.9), "from 0 to 100"),
        (lambda c: c.update(benchmarks={}), "one benchmark at least"),
        (lambda c: c.pop("points"), "'points' is missing"),
        (lambda c: c["conditions"].update(top_k=3), "top_k"),
    ],
)
def test_a_file_that_holds_no_such_figures_is_refused(
    change: Callable[[dict[str, Any]], None], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        acceptance.find(str(figures_file(tmp_path, change)))
