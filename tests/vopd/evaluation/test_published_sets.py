"""What is particular to each published set: small files in its layout, and the figures its own evaluation makes."""

import base64
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.vopd.evaluation import conftest as layouts
from tests.vopd.evaluation.test_metrics import figures, record
from vopd.errors import UserError
from vopd.evaluation import benchmark, description, evaluate, metrics, reencoding
from vopd.evaluation.scoring import parse_answer

Start = Callable[..., Any]

# Domains and task names as public results of MME-RealWorld print them; the numbers of two are published.
TASKS = {
    "Perception/Monitoring": [
        "vehicle/counting", "Vehicle/counting", "vehicle/location", "vehicle/attribute/color",
        "vehicle/attribute/orientation", "person/counting", "Person/counting", "person/attribute/color",
        "person/attribute/orientation",
    ],
    "Reasoning/Monitoring": ["calculate", "intention", "property"],
    "Perception/Remote Sensing": ["color", "count", "position"],
    "Perception/Autonomous_Driving": [
        "Attribute_Motion_MultiPedestrians", "Attribute_Motion_MultiVehicles", "Attribute_Motion_Pedestrain",
        "Attribute_Motion_Vehicle", "Attribute_Visual_TrafficSignal", "Objects_Identify", "Object_Count",
    ],
    "Reasoning/Autonomous_Driving": [
        "Attention_TrafficSignal", "Prediction_Intention_Ego", "Prediction_Intention_Pedestrian",
        "Prediction_Intention_Vehicle", "Relation_Interaction_Ego2Pedestrain", "Relation_Interaction_Ego2TrafficSignal",
        "Relation_Interaction_Ego2Vehicle", "Relation_Interaction_Other2Other",
    ],
    "Reasoning/OCR with Complex Context": ["Scene Understanding", "Character Identification"],
    "Perception/OCR with Complex Context": [
        "adver_and_product", "book_map_poster", "license", "phone_and_address", "text_recog",
    ],
    "Perception/Diagram and Table": ["Diagram", "Table"],
}  # fmt: skip
SIZES = {"person/counting": 936, "Person/counting": 28}


def ask(server: Any, data: Path, out: Path, name: str, *more: str) -> int:
    return evaluate.main(
        ["model=stub", f"benchmarks=[{name}]", f"endpoint={server.url}", f"data={data}", f"out={out}", *more]
    )


def summary(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / "stub" / name / "summary.json").read_text())


# ---- MME-RealWorld -------------------------------------------------------------------------------------------------


def test_options_with_full_width_brackets_are_known_by_their_labels_and_shown_whole(tmp_path: Path) -> None:
    options = [
        "(A) 红色（左侧）",
        "（B）蓝色（右侧）",
        "（C） 绿色",
        "(D）黄色",
        "(E) 该图像不包含旗帜",
    ]
    rows = [
        {"index": 0, "bytes": layouts.b64(0), "question": "旗帜是什么颜色？", "answer": "B",
         "multi-choice options": [*options, " "], "category": "Perception/Monitoring", "l2-category": "person/counting"}
    ]  # fmt: skip
    layouts.parquet(tmp_path / "mme_realworld_cn" / "data" / "train-00000-of-00001.parquet", rows)
    questions = benchmark.load("mme_realworld_cn", tmp_path)
    assert questions.remarks == ["mme_realworld_cn: its files hold 1 questions, 5462 are published."]
    (question,) = questions.questions
    assert question.options == tuple(options)
    assert f"选项如下所示:\n{chr(10).join(options)}\n根据图像" in question.prompt
    for said, letter in [("B", "B"), ("（B）", "B"), ("蓝色（右侧）", "B"), ("绿色", "C"), ("黄色", "D")]:
        assert parse_answer(said, "letter", question.options).value == letter, said


def test_the_mean_over_tasks_is_over_the_official_grouping() -> None:
    names = [(domain, task) for domain, tasks in TASKS.items() for task in tasks]
    assert len(names) == len({task for _, task in names}) == 39
    records = [
        record(f"{task} {i}", "A" if (i + len(task)) % 3 else "B", "A", domain=domain, task=task)
        for domain, task in names
        for i in range(SIZES.get(task, 4))
    ]
    result = figures("mme_realworld_en", records)
    parts = result["official mean, parts"]
    assert len(parts) == 35
    assert parts["perception/monitoring / person/counting"]["questions"] == 964
    assert parts["perception/monitoring / person/attribute"]["questions"] == 8
    mean = sum(part["value"] for part in parts.values()) / 35
    assert result["official mean"]["value"] == pytest.approx(mean)
    raw = {
        task: [r.response == "A" for r in records if r.details["groups"]["task"] == task] for _, task in names
    }
    assert mean != pytest.approx(sum(sum(r) / len(r) for r in raw.values()) / 39)
    assert set(result["by domain"]) == set(TASKS)


def test_one_task_name_in_two_domains_is_two_tasks() -> None:
    records = [
        record(str(i), "A", "A", domain=domain, task="Table")
        for i, domain in enumerate(("Reasoning/Diagram and Table", "Perception/Diagram and Table"))
    ]
    assert len(figures("mme_realworld_lite", records)["official mean, parts"]) == 2


# ---- MMVP ----------------------------------------------------------------------------------------------------------


def test_mmvp_is_reported_by_the_published_and_by_the_corrected_golds() -> None:
    def answers(said: dict[str, str]) -> dict[str, Any]:
        ids = ("97", "98", "99", "100", "279", "280")
        return figures(
            "mmvp",
            [
                record(i, said.get(i, "(a)"), "(a)" if int(i) % 2 else "(b)", cluster=str((int(i) - 1) // 2))
                for i in ids
            ],
        )

    # 97 and 98 are right; 99, 100 and 280 are what the corrected golds say; 279 is unparsed.
    result = answers({"98": "(b)", "99": "(b)", "100": "(a)", "279": "Perhaps", "280": "(a)"})
    assert result["accuracy"]["value"] == pytest.approx(2 / 6)
    assert result["accuracy, corrected golds"]["value"] == pytest.approx(5 / 6)
    assert result["pair accuracy"]["value"] == pytest.approx(1 / 3)
    assert result["pair accuracy, corrected golds"]["value"] == pytest.approx(2 / 3)
    with pytest.raises(UserError, match=r"question '99', whose gold '\(c\)' is neither"):
        figures("mmvp", [record("99", "(a)", "(c)", cluster="49"), record("100", "(a)", "(a)", cluster="49")])


def test_a_judge_that_accepts_a_response_for_the_published_gold_does_not_accept_it_for_the_other() -> None:
    records = [
        dataclasses.replace(
            record("99", "...", "(a)", cluster="49"), parsed="B", correct=True
        ),  # judged right
        dataclasses.replace(record("100", "...", "(a)", cluster="49"), parsed="B", correct=False),
    ]
    result = metrics.figures(records, benchmark.find("mmvp")[1])
    assert (result["accuracy"]["value"], result["accuracy, corrected golds"]["value"]) == (0.5, 0.5)
    assert result["pair accuracy, corrected golds"]["value"] == 0.0


# ---- tables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says", "shown"),
    [
        ("pope", "Yes.", ["50.0 [", "F1 66.7, yes 100.0"]),
        ("mmvp", "(a)", ["50.0 [", "0.0 [", "corrected 50.0, pairs 0.0"]),
        ("cv_bench", "B", ["100.0 [", "paper's mean 100.0"]),
    ],
)
def test_the_table_shows_what_each_set_reports(
    name: str, says: str, shown: list[str], stub: Start, published: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    server = stub(lambda body: {"text": says})
    assert ask(server, published, tmp_path, name) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in shown), printed


# ---- V* ------------------------------------------------------------------------------------------------------------


def pictures_of(server: Any) -> list[tuple[str, bytes]]:
    urls = [b["messages"][0]["content"][0]["image_url"]["url"] for b in server.asked]
    return [(url.split(";")[0], base64.b64decode(url.split(",", 1)[1])) for url in urls]


def test_vstar_is_asked_with_published_bytes_or_as_the_paper_encodes_them(
    stub: Start,
    published: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = stub(lambda body: {"text": "A"})
    assert ask(server, published, tmp_path, "vstar", "rows=1") == 0
    assert pictures_of(server) == [("data:image/jpeg", layouts.picture(0))]

    assert ask(server, published, tmp_path, "vstar", "pictures=official") == 2
    assert "made with pictures 'published', now pictures is 'official'" in capsys.readouterr().err

    other = stub(lambda body: {"text": "A"})
    assert ask(other, published, tmp_path / "official", "vstar", "rows=1", "pictures=official") == 0
    ((kind, content),) = pictures_of(other)
    assert kind == "data:image/png"
    pixels = [Image.open(io.BytesIO(c)).convert("RGB").tobytes() for c in (content, layouts.picture(0))]
    assert pixels[0] == pixels[1]

    # Other sets are sent as they are, and records from before the setting existed were asked with published bytes.
    assert ask(other, published, tmp_path / "official", "mmstar", "rows=1", "pictures=official") == 0
    assert pictures_of(other)[1] == ("data:image/jpeg", layouts.picture(0))
    settings = tmp_path / "stub" / "vstar" / "settings.json"
    settings.write_text(
        json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "pictures"})
    )
    assert ask(server, published, tmp_path, "vstar", "rows=1") == 0


def test_a_png_above_the_limit_is_made_smaller_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = Image.effect_noise((400, 300), 90).convert("RGB")
    content = io.BytesIO()
    noisy.save(content, "PNG")
    monkeypatch.setattr(reencoding, "MOST_BYTES", 40_000)
    made = reencoding.reencoded(content.getvalue(), benchmark.PICTURES)
    assert len(made) <= 40_000 < len(content.getvalue())
    assert Image.open(io.BytesIO(made)).size in [(300, 225), (225, 168), (168, 126), (126, 94)]
    monkeypatch.setattr(reencoding, "MOST_BYTES", 1)
    assert (
        min(Image.open(io.BytesIO(reencoding.reencoded(made, benchmark.PICTURES))).size)
        <= reencoding.LEAST_SIDE
    )


# ---- ZoomBench -----------------------------------------------------------------------------------------------------


def zoombench(folder: Path, crops: tuple[bool, ...]) -> None:
    choice = "Which colour is the sign?\nA. red\nB. blue\nC. green\nD. yellow"
    rows = [
        {"id": i, "query": choice if i else "How many birds?", "response": "B" if i else "7",
         "image": {"bytes": layouts.picture(i), "path": None}, "question_type": "x",
         "crop_image": {"bytes": layouts.picture(i + 4), "path": None} if crop else None}
        for i, crop in enumerate(crops)
    ]  # fmt: skip
    layouts.parquet(folder / "zoombench" / "data" / "test.parquet", rows, ("image", "crop_image"))


def test_zoombench_is_counted_and_its_crops_are_asked_where_there_are_some(
    stub: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoombench(tmp_path, (True, False, True))
    server = stub(lambda body: {"text": "B"})
    assert ask(server, tmp_path, tmp_path, "zoombench") == 0
    shown = capsys.readouterr().out
    assert "zoombench: 2 letter and 1 open questions, 621 and 224 are published." in shown
    assert "zoombench: 2 of 3 questions have a crop; the view crop asks those." in shown
    assert len(server.asked) == 5
    views = summary(tmp_path, "zoombench")["variants"]["full"]
    assert {view: views[view]["questions"] for view in ("full", "crop")} == {"full": 3, "crop": 2}
    assert ask(server, tmp_path, tmp_path, "zoombench") == 0
    assert len(server.asked) == 5


def test_zoombench_as_published_says_its_counts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoombench(tmp_path, (True, True, True))
    name, spec = benchmark.find("zoombench")
    assert (spec.rows, spec.letters) == (845, 621)
    spec.rows, spec.letters = 3, 2
    monkeypatch.setattr(benchmark, "find", lambda _: (name, spec))
    assert benchmark.load("zoombench", tmp_path).remarks == ["zoombench: 2 letter and 1 open questions."]


def test_without_any_crop_the_view_cannot_be_asked(
    stub: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoombench(tmp_path, (False, False))
    assert ask(stub(lambda body: {"text": "B"}), tmp_path, tmp_path, "zoombench", "views=[crop]") == 2
    assert "zoombench has no crops" in capsys.readouterr().err


# ---- what is not known ---------------------------------------------------------------------------------------------


def test_repeated_ids_are_numbered_and_told_where_nobody_knows_whether_they_are_unique(
    tmp_path: Path,
) -> None:
    layouts.pope(tmp_path / "pope")
    file = tmp_path / "pope" / "data" / "test-00000-of-00001.parquet"
    (file.parent / "test-00001-of-00001.parquet").write_bytes(file.read_bytes())
    questions = benchmark.load("pope", tmp_path)
    assert "pope: 12 questions repeat an id; theirs end in #2, #3 and so on." in questions.remarks
    assert len({q.id for q in questions.questions}) == 24
    assert questions.questions[12].id == f"{questions.questions[0].id}#2"


def test_unknown_columns_are_named_once_an_evaluation(
    stub: Start, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = stub(lambda body: {"text": "A"})
    assert ask(server, published, tmp_path, "vstar,pope,mme_realworld_cn", "rows=1") == 0
    shown = capsys.readouterr().out
    assert shown.count("knows the published columns for sure") == 1
    assert "pope, mme_realworld_cn: nobody here knows" in shown
    assert ask(server, published, tmp_path, "vstar", "rows=1") == 0
    assert "for sure" not in capsys.readouterr().out


def test_a_mean_names_groups_of_the_benchmark_and_weights_that_add_up_to_something(tmp_path: Path) -> None:
    text = (benchmark.FOLDER / "cv_bench.yaml").read_text()
    for change, sentence in [
        (("over: [type]", "over: [kind]"), "name the group 'kind'"),
        (("weights: {2D: 0.5, 3D: 0.5}", "weights: {2D: 0, 3D: 0}"), "not all 0"),
    ]:
        file = tmp_path / "mine.yaml"
        file.write_text(text.replace(*change))
        with pytest.raises(UserError, match=sentence):
            description.read(file)
