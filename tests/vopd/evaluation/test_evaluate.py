"""The evaluation command against a local stub server: resume after SIGKILL, refusals, judge, variants, tables."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vopd.config import ROOT
from vopd.evaluation import asking, evaluate
from vopd.evaluation.endpoint import Resizing
from vopd.evaluation.records import read_records

BASE = ROOT / "data" / "miniature" / "base"
Start = Callable[..., Any]


def right(body: dict[str, Any]) -> dict[str, Any]:
    """POPE's fixture: dog and car are there."""
    text = body["messages"][0]["content"][-1]["text"]
    return {"text": "Yes." if "dog" in text or "car" in text else "No."}


def overrides(server: Any, data: Path, out: Path, *more: str, name: str = "pope") -> list[str]:
    return [
        "model=stub",
        f"benchmarks=[{name}]",
        f"endpoint={server.url}",
        f"data={data}",
        f"out={out}",
        *more,
    ]


def records_of(out: Path, name: str = "pope") -> list[Any]:
    return read_records(out / "stub" / name / "records.jsonl").records


def summary_of(out: Path, name: str = "pope") -> dict[str, Any]:
    return json.loads((out / "stub" / name / "summary.json").read_text())


# ---- killed and started again --------------------------------------------------------------------------------------


def test_killed_and_restarted_it_asks_only_what_is_missing(
    stub: Start, published: Path, tmp_path: Path
) -> None:
    server = stub(right, delay=0.4)
    arguments = overrides(server, published, tmp_path, "concurrency=2")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-m", "vopd", "evaluate", *arguments]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
    records = tmp_path / "stub" / "pope" / "records.jsonl"
    deadline = time.monotonic() + 120
    while not (records.exists() and records.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = records_of(tmp_path)
    asked_before = len(server.asked)
    assert 4 <= len(kept) <= asked_before <= len(kept) + 2  # two at a time were in flight
    with records.open("a") as file:
        file.write('{"id": "torn by the ki')
    assert subprocess.run(command, env=env, stdout=subprocess.DEVNULL).returncode == 0
    after = records_of(tmp_path)
    assert after[: len(kept)] == kept  # nothing lost, nothing changed
    assert len({r.id for r in after}) == len(after) == 12
    assert len(server.asked) - asked_before == 12 - len(kept)
    asked = Counter(b["messages"][0]["content"][-1]["text"] + b["messages"][0]["content"][0]["image_url"]["url"]
                    for b in server.asked)  # fmt: skip
    assert sum(asked.values()) <= 12 + 2
    total = len(server.asked)
    assert evaluate.main(arguments) == 0
    assert len(server.asked) == total  # a finished set asks nothing
    assert summary_of(tmp_path)["variants"]["full"]["full"]["accuracy"]["value"] == 1.0


def test_a_question_without_an_answer_leaves_no_record_and_is_asked_again(
    stub: Start, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {"on": True}

    def answer(body: dict[str, Any]) -> dict[str, Any] | int:
        return 400 if broken["on"] and "bus" in body["messages"][0]["content"][-1]["text"] else right(body)

    server = stub(answer)
    assert evaluate.main(overrides(server, published, tmp_path)) == 1
    assert "3 questions got no answer" in capsys.readouterr().out
    assert len(records_of(tmp_path)) == 9
    broken["on"] = False
    before = len(server.asked)
    assert evaluate.main(overrides(server, published, tmp_path)) == 0
    assert len(server.asked) - before == 3
    assert len(records_of(tmp_path)) == 12


def test_a_server_that_is_gone_ends_the_run_and_keeps_what_it_has(
    stub: Start,
    published: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asking, "MOST_FAILURES", 3)
    server = stub(lambda body: right(body) if len(server.asked) <= 4 else 400)
    assert evaluate.main(overrides(server, published, tmp_path, "concurrency=1")) == 2
    assert "3 questions in a row got no answer" in capsys.readouterr().err
    assert len(records_of(tmp_path)) == 4


def test_several_benchmarks_are_asked_through_one_client(
    stub: Start, published: Path, tmp_path: Path
) -> None:
    server = stub(lambda body: {"text": "Answer: B"})
    assert evaluate.main(overrides(server, published, tmp_path, name="vstar,mmvp,mmstar")) == 0
    assert [len(records_of(tmp_path, name)) for name in ("vstar", "mmvp", "mmstar")] == [3, 4, 4]
    assert len(server.asked) == 11  # none was sent twice


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("thinking=true", "thinking"),
        ("max_tokens=5", "max_tokens"),
        ("temperature=0.5", "temperature"),
        ("seed=1", "seed"),
    ],
)
def test_records_of_other_settings_are_refused(
    override: str, key: str, stub: Start, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = stub(right)
    assert evaluate.main(overrides(server, published, tmp_path, "rows=2")) == 0
    assert evaluate.main(overrides(server, published, tmp_path, override)) == 2
    assert f"its records were made with {key} " in capsys.readouterr().err
    assert len(server.asked) == 2


def test_records_of_other_code_or_pictures_are_refused(
    stub: Start,
    published: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, data = stub(right), tmp_path / "data"
    shutil.copytree(published / "mmvp", data / "mmvp")
    arguments = overrides(server, data, tmp_path, name="mmvp")
    settings = tmp_path / "stub" / "mmvp" / "settings.json"
    assert evaluate.main(arguments) == 0 == evaluate.main(arguments)
    before = settings.read_text()

    def refused(by: str) -> bool:
        answer = evaluate.main(arguments)
        return answer == 2 and f"do not match the current inputs: {by}" in capsys.readouterr().err

    content = json.loads(before)
    content["made_from"]["code vopd/views.py"] = "an older one"
    settings.write_text(json.dumps(content))
    assert refused("another code vopd/views.py;")
    settings.write_text(json.dumps({k: v for k, v in content.items() if k != "made_from"}))
    assert refused("with which code")
    settings.write_text(before)
    assert evaluate.main(arguments) == 0
    picture = sorted(data.rglob("*.jpg"))[0]
    content = bytearray(picture.read_bytes())
    content[-9] ^= 1
    picture.write_bytes(content)
    assert refused("another content of the files;")
    assert settings.read_text() == before


def test_settings_reach_the_server(stub: Start, published: Path, tmp_path: Path) -> None:
    server = stub(right)
    assert (
        evaluate.main(overrides(server, published, tmp_path, "rows=2", "thinking=true", "temperature=0.7"))
        == 0
    )
    first, second = server.asked
    assert first["chat_template_kwargs"] == {"enable_thinking": True}
    assert (first["temperature"], first["max_tokens"]) == (0.7, 32768)
    assert first["seed"] != second["seed"]
    greedy = stub(right)
    assert evaluate.main(overrides(greedy, published, tmp_path / "greedy", "rows=1")) == 0
    assert (greedy.asked[0]["temperature"], greedy.asked[0].get("seed")) == (0.0, None)
    assert greedy.asked[0]["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["modell=x"], "modell"),
        (["model=x"], "'benchmarks' has no value"),
        (["model=x", "benchmarks=[none]"], "no benchmark 'none'"),
        (["model=x", "benchmarks=[pope]", "scorer=lenient"], "scorer=lenient is unknown"),
        (["model=x", "benchmarks=[pope]", "views=[noise]"], "views: noise is unknown"),
        (["model=x", "benchmarks=[pope]", "rows=many"], "rows"),
        (["model"], "'model' is not a setting"),
        (["model=x", "benchmarks=[pope]", "judge.endpoint=http://x"], "judge.endpoint needs judge.model"),
    ],
)
def test_bad_words_end_with_code_2_and_a_sentence(
    given: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(given) == 2
    assert sentence in capsys.readouterr().err


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name}:" in shown for name in evaluate.Settings.__dataclass_fields__)


def test_two_evaluations_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with (
        asking.only_writer(tmp_path),
        pytest.raises(evaluate.UserError, match="another evaluation"),
        asking.only_writer(tmp_path),
    ):
        pass


# ---- what a record and the table say -------------------------------------------------------------------------------


def test_truncation_reasoning_sizes_and_times_are_recorded(
    stub: Start, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = stub(
        lambda body: {"text": "", "finish": "length", "message": {"reasoning_content": "Hm."}}, delay=0.05
    )
    assert evaluate.main(overrides(server, published, tmp_path, "rows=3", "--speed", "concurrency=1")) == 0
    record = records_of(tmp_path)[0]
    assert record.truncated and record.parsed is None and not record.correct
    assert record.details["reasoning"] == "Hm."
    assert record.details["image_in"] == [60, 40] and record.details["image_out"] is None
    assert record.details["seconds"] >= 0.05 and record.response_tokens == 3
    part = summary_of(tmp_path)["variants"]["full"]["full"]
    assert (part["truncated"], part["unparsed"]) == (1.0, 1.0)
    shown = capsys.readouterr().out
    assert f"POPE: {1 / part['seconds']:.3f} questions/s" in shown and "1 at once" in shown
    assert "3 of 9000" in shown


@pytest.mark.parametrize(
    ("finish", "text", "parsed"),
    [
        ("length", "The answer is A, or", None),
        ("stop", "The answer is A", "A"),
        ("length", "x</think>Answer: A", "A"),
    ],
)
def test_cut_reasoning_of_a_server_is_not_read_as_an_answer(
    finish: str, text: str, parsed: str | None, stub: Start, published: Path, tmp_path: Path
) -> None:
    server = stub(lambda body: {"text": text, "finish": finish})
    assert evaluate.main(overrides(server, published, tmp_path, "thinking=true", "rows=1", name="vstar")) == 0
    assert records_of(tmp_path, "vstar")[0].parsed == parsed


def test_a_benchmark_twice_or_without_the_view_is_refused(
    stub: Start, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = stub(right)
    assert evaluate.main(overrides(server, published, tmp_path, name="pope,pope")) == 2
    assert "twice" in capsys.readouterr().err
    assert evaluate.main(overrides(server, published, tmp_path, "views=[crop]")) == 2
    assert "pope has no crops" in capsys.readouterr().err
    assert server.asked == []


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (500, 40), (33, 47), (9, 70)])
def test_the_recorded_size_is_what_the_processor_makes(size: tuple[int, int]) -> None:
    from transformers import AutoImageProcessor

    width, height = Resizing(str(BASE))(*size) or (0, 0)
    processor = AutoImageProcessor.from_pretrained(BASE)
    (grid,) = processor(images=[Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"].tolist()
    assert [1, height // processor.patch_size, width // processor.patch_size] == grid


def test_the_official_scorer_reads_the_same_records_and_is_named(
    stub: Start, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = stub(lambda body: {"text": "Answer: B"})  # the published rule reads the A of "Answer"
    arguments = overrides(server, published, tmp_path, name="vstar")
    assert evaluate.main(arguments) == 0
    strict = summary_of(tmp_path, "vstar")
    assert evaluate.main([*arguments, "scorer=official"]) == 0
    official = summary_of(tmp_path, "vstar")
    assert len(server.asked) == 3
    assert (strict["scorer"], official["scorer"]) == ("strict", "official, rules only")
    values = [s["variants"]["full"]["full"]["by category"] for s in (strict, official)]
    assert values[0]["relative_position"]["value"] == 1.0  # gold B
    assert values[1]["relative_position"]["value"] == 0.0
    assert "official" in capsys.readouterr().out


def test_an_exclusion_list_gives_a_second_variant(
    stub: Start, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = stub(lambda body: {"text": "Yes"})
    file = tmp_path / "pope.json"
    listed = {
        "benchmark": "pope",
        "train": "t",
        "excluded": ["random/1", "random/3"],
        "method": {"hash": "phash"},
    }
    file.write_text(json.dumps(listed))
    assert evaluate.main(overrides(server, published, tmp_path, f"exclude=[{file}]")) == 0
    variants = summary_of(tmp_path)["variants"]
    assert {k: v["full"]["questions"] for k, v in variants.items()} == {"full": 12, "de-overlapped": 10}
    assert variants["full"]["full"]["accuracy"]["value"] == 0.5
    assert variants["de-overlapped"]["full"]["accuracy"]["value"] == 0.6
    assert summary_of(tmp_path)["exclusion"] == {"train": "t", "method": {"hash": "phash"}, "questions": 2}
    for change, sentence in [
        ({"excluded": ["random/77"]}, "question 'random/77' is not in pope"),
        ({"benchmark": "vstar"}, "is for benchmark 'vstar'"),
        ({"method": None}, None),
    ]:
        file.write_text(json.dumps(listed | change))
        assert evaluate.main(overrides(server, published, tmp_path, f"exclude=[{file}]")) == (
            2 if sentence else 0
        )
        assert sentence is None or sentence in capsys.readouterr().err
    file.write_text("[]")
    assert evaluate.main(overrides(server, published, tmp_path, f"exclude=[{file}]")) == 2


# ---- the judge -----------------------------------------------------------------------------------------------------


def test_the_judge_sees_only_what_is_open_and_its_failure_is_a_third_state(
    stub: Start, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"colour": "Answer: C", "birds": "There may be 5 or 7.", "say": "It is the way out only"}

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        text = body["messages"][0]["content"][-1]["text"]
        return {"text": next(v for k, v in said.items() if k in text)}

    verdict = {"text": "I would rather not say."}
    server, judge = stub(answer), stub(lambda body: verdict)
    arguments = overrides(server, published, tmp_path, "views=[full]", name="zoombench")
    assert evaluate.main(arguments) == 0
    assert summary_of(tmp_path, "zoombench")["variants"]["full"]["full"]["questions"] == 3
    judged = [*arguments, f"judge.endpoint={judge.url}", "judge.model=j"]
    assert evaluate.main(judged) == 0
    result = summary_of(tmp_path, "zoombench")
    assert len(judge.asked) == 2  # never the parsed (and wrong) letter
    assert not any("Answer: C" in b["messages"][0]["content"] for b in judge.asked)
    assert (result["judge_failed"], result["variants"]["full"]["full"]["questions"]) == (2, 1)
    assert result["scorer"] == "strict, judge j"
    verdict["text"] = "yes"
    assert evaluate.main(judged) == 0  # failed ones are asked again
    result = summary_of(tmp_path, "zoombench")
    assert (len(judge.asked), result["judge_failed"]) == (4, 0)
    assert result["variants"]["full"]["full"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert evaluate.main(judged) == 0
    assert len(judge.asked) == 4  # verdicts are kept
    assert evaluate.main([*judged[:-1], "judge.model=k"]) == 0
    assert len(judge.asked) == 6  # another judge's are not taken for its own
    assert evaluate.main(judged) == 0
    assert len(judge.asked) == 6
    verdicts = tmp_path / "stub" / "zoombench" / "judge.jsonl"
    verdicts.write_text(verdicts.read_text().replace('"asked": "', '"asked": "otherwise '))
    assert evaluate.main(judged) == 0
    assert len(judge.asked) == 8  # nor those that were asked for with another prompt
    assert len(server.asked) == 3
