"""An evaluation among faults: a full disk, folders and files of others, descriptions that a stranger wrote."""

import json
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vopd.errors import UserError
from vopd.evaluation import benchmark, description, evaluate, judge
from vopd.evaluation.records import read_answers

Start = Callable[..., Any]


def right(body: dict[str, Any]) -> dict[str, Any]:
    text = body["messages"][0]["content"][-1]["text"]
    return {"text": "Yes." if "dog" in text or "car" in text else "No."}


@pytest.fixture
def overrides(stub: Start, published: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides of an evaluation of POPE's fixture; `overrides.server` answers it."""
    server = stub(right)

    def given_overrides(*more: str, model: str = "stub") -> list[str]:
        usual = [
            "benchmarks=[pope]",
            f"endpoint={server.url}",
            f"data={published}",
            f"out={tmp_path / 'out'}",
        ]
        return [f"model={model}", *usual, *more]

    given_overrides.server = server  # type: ignore[attr-defined]
    return given_overrides


def test_a_full_disk_ends_in_a_sentence_and_nothing_answered_is_lost(
    overrides: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(overrides("rows=1")) == 0  # the library's copy of the data is made
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        assert evaluate.main(overrides("concurrency=1")) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (
        "records.jsonl: cannot be written (File too large); what it holds is kept" in capsys.readouterr().err
    )
    file = tmp_path / "out" / "stub" / "pope" / "records.jsonl"
    kept = read_answers(file)
    assert 1 < len(kept.records) < 12 and kept.torn == 0
    asked = len(overrides.server.asked)
    assert evaluate.main(overrides()) == 0
    assert len(overrides.server.asked) - asked == 12 - len(kept.records)
    assert read_answers(file).records[: len(kept.records)] == kept.records


def test_no_room_for_the_librarys_copy_is_not_the_files_fault(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def full(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetGenerationError("wrapped") from OSError(
            28, "No space left on device"
        )

    monkeypatch.setattr(datasets, "load_dataset", full)
    with pytest.raises(UserError, match=r"No space left on device\); make room, or set HF_HOME"):
        benchmark.load("pope", published)


def test_two_names_that_share_a_folder_do_not_share_answers(
    overrides: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(overrides(model="a/b")) == 0
    asked = len(overrides.server.asked)
    assert evaluate.main(overrides(model="a_b")) == 2
    assert "its records were made with name 'a/b', now name is 'a_b'" in capsys.readouterr().err
    assert len(overrides.server.asked) == asked
    assert evaluate.main(overrides(model="a/b")) == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"answer_type": "essay"}, "unknown answer type 'essay'"),
        ({"options": None}, "options holds None"),
        ({"groups": [1]}, "groups holds"),
        ({"seconds": "long"}, "seconds holds 'long'"),
        ({"concurrency": True}, "concurrency holds True"),
        ({"image_in": None}, "image_in holds None"),
        ({"groups": {}}, "has no group 'category'"),
        ({"id": 7}, "key 'id' holds 7"),
    ],
)
def test_a_record_of_another_kind_is_named(
    change: dict[str, Any], sentence: str, overrides: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(overrides("rows=2")) == 0
    file = tmp_path / "out" / "stub" / "pope" / "records.jsonl"
    first, rest = file.read_text().split("\n", 1)
    file.write_text(json.dumps(json.loads(first) | change) + "\n" + rest)
    assert evaluate.main(overrides("rows=2")) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"id": 1, "view": "full", "verdict": "right"}',
                                  '{"id": "a", "view": "full", "verdict": ["right"]}'])  # fmt: skip
def test_a_verdict_that_is_none_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "judge.jsonl").write_text(f'{line}\n{{"torn')
    with pytest.raises(UserError, match=r"Line 1 of .*judge\.jsonl"):
        judge.read_replies(tmp_path / "judge.jsonl")


def test_what_comes_from_a_file_is_printed_as_it_stands(
    overrides: Any, tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = (benchmark.FOLDER / "pope.yaml").read_text()
    hostile = 'title: "[/red]\\e[31mPOPE[bold]"\nfolder: "' + str(published / "pope") + '"'
    (tmp_path / "hostile.yaml").write_text(spec.replace("title: POPE", hostile).replace("hub:", "# hub:"))
    asked = [override for override in overrides("--speed", model="'[/x]'") if "benchmarks=" not in override]
    assert evaluate.main([*asked, f"benchmarks=[{tmp_path / 'hostile.yaml'}]"]) == 0
    out = capsys.readouterr().out
    assert "[/red]" in out and "[_x]" in out and "\x1b[31m" not in out


# ---- descriptions --------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    | st.sampled_from(["pair", "image", "../x", "/x", "{id}", "{0}", "{id", "*.csv", "letter"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FIELDS = st.sampled_from(sorted(description.Benchmark.__dataclass_fields__))


@given(st.dictionaries(FIELDS, VALUES, max_size=3))
def test_any_description_is_one_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    good = {"title": "t", "files": "*.csv", "rows": 1, "licence": "l", "prompt": "p", "answer_type": "letter",
            "official_rule": "r", "columns": {"question": "q", "answer": "a", "image": "i"}}  # fmt: skip
    file = tmp_path_factory.mktemp("description") / "d.yaml"
    file.write_text(json.dumps(good | changes))
    with suppress(UserError):
        spec = description.read(file)
        assert not description.leads_out(spec.files) and spec.rows >= 0
        spec.option_columns(), spec.cluster_columns(), spec.picture_columns()


@pytest.mark.parametrize("name", sorted(p.stem for p in benchmark.FOLDER.glob("*.yaml")))
def test_our_own_descriptions_pass(name: str) -> None:
    assert benchmark.find(name)[0] == name


def test_only_columns_that_are_named_are_ever_read(tmp_path: Path) -> None:
    """A column of pictures or sounds can name a file of this machine, which reading a row would open."""
    import datasets

    secret = tmp_path / "secret.png"
    secret.write_bytes(b"not to be opened")
    rows = [{"id": "1", "question": "Is it?", "answer": "yes", "image": "eA==",
             "more": {"bytes": None, "path": str(secret)}}]  # fmt: skip
    table = datasets.Dataset.from_list(rows).cast_column("more", datasets.Image(decode=False))
    table = table.cast_column("more", datasets.Image())
    table.to_parquet(str(tmp_path / "a.parquet"))
    spec = {"title": "t", "files": "a.parquet", "rows": 1, "licence": "l", "prompt": "{question}",
            "answer_type": "yes/no", "official_rule": "r", "folder": str(tmp_path),
            "columns": {"id": ["id"], "question": "question", "answer": "answer", "image": "image"}}  # fmt: skip
    (tmp_path / "mine.yaml").write_text(json.dumps(spec))
    assert [q.id for q in benchmark.load(str(tmp_path / "mine.yaml"), tmp_path).questions] == ["1"]
    spec["columns"]["question"] = "more"  # type: ignore[index]
    (tmp_path / "mine.yaml").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="column 'more' should hold text and holds Image"):
        benchmark.load(str(tmp_path / "mine.yaml"), tmp_path)


def test_a_download_that_fails_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    sentence = r"vstar-bench could not be downloaded at revision b44023b\w+ \(no route to host\).*put the"
    with pytest.raises(UserError, match=sentence):
        benchmark.load("vstar", tmp_path)
