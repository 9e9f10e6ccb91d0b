"""Every kind of finding has a row or set that makes it, and is told from all others; quarantine and stamp follow."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jinja2 import TemplateError
from PIL import Image, PngImagePlugin
from transformers import AutoProcessor

from data import schema, validate, validation_stamp
from data.miniature import prepare
from vopd.errors import UserError

BASE = Path(__file__).parents[2] / "data" / "miniature" / "base"
ROWS = 24


def raw_write(rows: list[dict], path: Path) -> Path:
    """Writes rows without the writer's own check."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.FEATURES.arrow_schema), path, row_group_size=10)
    return path


def rows(split: str = "train", count: int = ROWS) -> list[dict]:
    return list(prepare.rows(split, count, seed=0))


def kinds(report: validate.Report) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for finding in report.findings:
        found.setdefault(finding.kind, []).append(finding.id)
    return found


def encoded(picture: Image.Image, format_: str = "PNG", **more: Any) -> dict:
    buffer = io.BytesIO()
    picture.save(buffer, format_, **more)
    return {"bytes": buffer.getvalue(), "path": None}


def picture_of(cell: dict) -> Image.Image:
    return Image.open(io.BytesIO(cell["bytes"])).convert("RGB")


def bomb() -> dict:
    """A PNG of a few bytes whose header promises 40,000 x 40,000 pixels."""
    ihdr = (40000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    buffer = io.BytesIO(b"")
    buffer.write(b"\x89PNG\r\n\x1a\n")
    PngImagePlugin.putchunk(buffer, b"IHDR", ihdr)
    PngImagePlugin.putchunk(buffer, b"IDAT", b"")
    return {"bytes": buffer.getvalue(), "path": None}


def shifted(row: dict) -> dict:
    x0, y0, x1, y1 = row["box"]
    sign = -1 if x1 > 100 else 1
    return row | {"box": [x0 + 6 * sign, y0, x1 + 6 * sign, y1]}


def wide(row: dict) -> dict:
    """Box and crop of more than a tenth of the image; the crop still shows the box."""
    box = [20, 20, 70, 70]
    return row | {"box": box, "crop": encoded(picture_of(row["image"]).crop(tuple(box)))}


DEFECTS: dict[str, tuple[str, Callable[[dict], dict]]] = {
    "cut short": ("unreadable", lambda r: r | {"image": {"bytes": r["image"]["bytes"][:-500], "path": None}}),
    "no image": ("unreadable", lambda r: r | {"crop": {"bytes": b"hello", "path": None}}),
    "TIFF": ("unreadable", lambda r: r | {"image": encoded(picture_of(r["image"]), "TIFF")}),
    "GIF": ("unreadable", lambda r: r | {"crop": encoded(picture_of(r["crop"]), "GIF")}),
    "broken original": ("unreadable", lambda r: r | {"original": {"bytes": b"no", "path": None}}),
    "missing file": ("unreadable", lambda r: r | {"image": {"bytes": None, "path": "images/no.png"}}),
    "file outside": ("unreadable", lambda r: r | {"image": {"bytes": None, "path": "../../x.png"}}),
    "bomb": ("size", lambda r: r | {"image": bomb()}),
    "tiny crop": ("size", lambda r: r | {"crop": encoded(picture_of(r["crop"]).resize((9, 9)))}),
    "other size": ("size", lambda r: r | {"original": encoded(picture_of(r["image"]).resize((99, 99)))}),
    "box outside": ("box", lambda r: r | {"box": [100, 100, 140, 110]}),
    "box turned": ("box", lambda r: r | {"box": [60, 60, 50, 70]}),
    "box too large": ("area", wide),
    "box shifted": ("crop", shifted),
    "crop of another": ("crop", lambda r: r | {"crop": rows("test", 1)[0]["crop"]}),
    "option twice": ("options", lambda r: r | {"options": ["1", "2 ", " 2", "3"]}),
    "option empty": ("options", lambda r: r | {"options": ["1", "", "2", "3"]}),
    "one option": ("options", lambda r: r | {"options": ["1"], "answer": "A"}),
    "answer beyond": ("answer", lambda r: r | {"answer": "E"}),
    "answer in words": ("answer", lambda r: r | {"answer": "green"}),
    "no answer": ("answer", lambda r: r | {"answer_type": "short", "answer": " ", "options": []}),
    "no hint": ("hint", lambda r: r | {"hint": ""}),
    "hint not said": ("hint", lambda r: r | {"hint": "Look there."}),
    "other split": ("split", lambda r: r | {"split": "test"}),
    "empty id": ("schema", lambda r: r | {"id": ""}),
    "blank id": ("schema", lambda r: r | {"id": " \t"}),
    "null id": ("schema", lambda r: r | {"id": None}),
    "control characters in an id": ("schema", lambda r: r | {"id": "a\x1b[2Jb"}),
    "question without end": ("schema", lambda r: r | {"question": "a" * 1_000_001 + r["question"]}),
    "box with a null": ("box", lambda r: r | {"box": [1, None, 3, 4]}),
    "null option": ("options", lambda r: r | {"options": ["1", None, "2", "3"]}),
    "null option of a number": (
        "options",
        lambda r: r | {"options": [None], "answer_type": "number", "answer": "3"},
    ),
    "more options than letters": (
        "options",
        lambda r: r | {"options": [str(n) for n in range(27)], "answer": "A"},
    ),
    "not yes or no": ("answer", lambda r: r | {"answer_type": "yes/no", "answer": "maybe", "options": []}),
    "no number": ("answer", lambda r: r | {"answer_type": "number", "answer": "a few", "options": []}),
    "folder for an image": ("unreadable", lambda r: r | {"image": {"bytes": None, "path": "."}}),
    "endless name": ("unreadable", lambda r: r | {"image": {"bytes": None, "path": "a" * 5000}}),
    "neither bytes nor path": ("unreadable", lambda r: r | {"crop": {"bytes": None, "path": None}}),
    "no question": ("schema", lambda r: r | {"question": None}),
    "no type": ("schema", lambda r: r | {"answer_type": "essay"}),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_each_defect_gets_its_kind_and_no_other(name: str, tmp_path: Path) -> None:
    kind, spoil = DEFECTS[name]
    data = rows()
    data[7] = spoil(data[7])
    report = validate.validate([raw_write(data, tmp_path / "train.parquet")])
    assert kinds(report) == {kind: [data[7]["id"] or ""]}
    assert [f.number for f in report.blocking] == [7]
    shown = validate._shown(data[7]["id"]) if (data[7]["id"] or "").strip() else "row 7"
    assert f"BAD: {kind}: 1" in report.text() and f"train {shown}: " in report.text()
    assert "\x1b" not in report.text() and len(report.text()) < 2000


def test_every_blocking_kind_of_a_row_has_a_defect_here() -> None:
    of_sets = {"duplicate", "leak", "prompt", "length"}  # below
    assert {kind for kind, _ in DEFECTS.values()} == set(validate.BLOCKING) - of_sets


def test_good_rows_have_no_finding(tmp_path: Path) -> None:
    report = validate.validate([raw_write(rows(count=72), tmp_path / "train.parquet")])
    assert report.findings == [] and report.rows == {"train": 72} and report.letters["train"].total() == 72


def test_several_defects_of_a_row_are_all_told(tmp_path: Path) -> None:
    data = rows()
    data[2] |= {"answer": "E", "hint": "", "box": [0, 0, 500, 500]}
    assert set(kinds(validate.validate([raw_write(data, tmp_path / "train.parquet")]))) == {
        "answer",
        "hint",
        "box",
    }


def test_duplicate_ids_within_and_across_splits(tmp_path: Path) -> None:
    train, test = rows(), rows("test")
    train[5]["id"] = train[4]["id"]
    test[3]["id"] = train[0]["id"]
    paths = [raw_write(train, tmp_path / "train.parquet"), raw_write(test, tmp_path / "test.parquet")]
    report = validate.validate(paths)
    assert [(f.kind, f.split, f.number) for f in report.findings] == [
        ("duplicate", "train", 5),
        ("duplicate", "test", 3),
    ]


def re_encoded(row: dict, id_: str) -> dict:
    picture = picture_of(row["image"])
    return row | {"id": id_, "image": encoded(picture, "JPEG", quality=95, subsampling=0)}


def test_near_duplicates_warn_within_a_split_and_block_across(tmp_path: Path) -> None:
    train, test = rows(), rows("test")
    train.append(re_encoded(train[6], "copy"))
    test.append(re_encoded(train[9], "seen in training") | {"split": "test"})
    paths = [raw_write(train, tmp_path / "train.parquet"), raw_write(test, tmp_path / "test.parquet")]
    report = validate.validate(paths)
    assert kinds(report) == {"near-duplicate": ["copy"], "leak": ["train-0-000009"]}
    assert [f.id for f in report.blocking] == ["train-0-000009"]
    assert "looks like test seen in training" in report.text()


def test_uneven_letters_warn(tmp_path: Path) -> None:
    data = rows(count=60)
    for row in data:
        right = row["options"].pop("ABCD".index(row["answer"]))
        row["options"].insert(0, right)
        row["answer"] = "A"
    for row in data[:6]:
        row["options"] = row["options"][::-1]
        row["answer"] = "D"
    report = validate.validate([raw_write(data, tmp_path / "train.parquet")])
    assert kinds(report) == {"balance": [""]} and report.blocking == []
    assert "A 90.0%, D 10.0%" in report.text()


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(BASE)


def test_long_prompts(tmp_path: Path, processor: Any) -> None:
    data = rows()
    usual = [schema.outline(row, tmp_path) for row in data]
    limit = max(validate.prompt_lengths(usual, processor, "crop", {}))
    data[3]["question"] = "word " * 200 + data[3]["question"]
    data[4]["crop"] = encoded(picture_of(data[4]["crop"]).resize((128, 128)))
    path = raw_write(data, tmp_path / "train.parquet")
    report = validate.validate([path], validate.Prompts(processor, limit, views=("crop",)))
    assert [(f.kind, f.id) for f in report.findings] == [("length", f"train-0-00000{i}") for i in (3, 4)]
    assert report.findings[-1].reason.endswith(f"in the crop view, the limit is {limit}")
    assert validate.validate([path], validate.Prompts(processor, 5000)).findings == []


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paths", [False, True], ids=["bytes", "paths"])
@pytest.mark.parametrize("shard", [0, 10], ids=["whole", "shards"])
def test_quarantine_parts_good_from_bad(tmp_path: Path, paths: bool, shard: int, capsys: Any) -> None:
    data, folder, out = rows(), tmp_path / "set", tmp_path / "good"
    if paths:
        (folder / "images").mkdir(parents=True)
        for row in data:
            for column in schema.IMAGES:
                name = f"images/{row['id']}-{column}.png"
                (folder / name).write_bytes(row[column]["bytes"])
                row[column] = {"bytes": None, "path": name}
    if shard:
        schema.write_shards(data, folder / "train.parquet", shard)
    else:
        schema.write(data, folder / "train.parquet")
    schema.write(rows("test"), folder / "test.parquet")
    table = pq.read_table(schema.shards(folder / "train.parquet")[0]).to_pylist()
    table[2] |= {"answer": "Q", "hint": ""}
    table[5] = shifted(table[5])
    raw_write(table, schema.shards(folder / "train.parquet")[0])
    assert validate.main([str(folder), "--quarantine", str(out)]) == 0
    said = capsys.readouterr().out
    assert "2 bad rows of 48" in said and "0 bad rows of 46" in said
    bad = [json.loads(line) for line in (out / "quarantined.jsonl").read_text().splitlines()]
    assert [(b["split"], b["row"], b["id"], sorted(b["reasons"])) for b in bad] == [
        ("train", 2, "train-0-000002", ["answer", "hint"]),
        ("train", 5, "train-0-000005", ["crop"]),
    ]
    assert not (folder / validation_stamp.NAME).exists() and set(
        validation_stamp.check(out, ["train", "test"])
    ) == {
        "train",
        "test",
    }
    kept = schema.read(out / "train.parquet")
    assert kept["id"] == [row["id"] for i, row in enumerate(data) if i not in (2, 5)]
    assert kept[0]["image"].size == (128, 128)
    assert len(schema.shards(out / "train.parquet")) == (3 if shard else 1)


def bad_set(folder: Path) -> Path:
    data = rows(count=6)
    data[0]["answer"] = "Q"
    raw_write(data, folder / "train.parquet")
    return folder


def test_a_quarantine_replaces_an_earlier_one_and_nothing_else(tmp_path: Path, capsys: Any) -> None:
    bad, out = bad_set(tmp_path / "bad"), tmp_path / "good"
    arguments = [str(bad), "--quarantine", str(out)]
    assert validate.main(arguments) == 0 and (out / "quarantined.jsonl").is_file()
    schema.write(rows("test", 6), bad / "test.parquet")
    assert validate.main(arguments) == 0 and (out / "test.parquet").is_file()
    (bad / "test.parquet").unlink()
    assert (
        validate.main(arguments) == 0 and not (out / "test.parquet").exists()
    )  # nothing of another set is left
    (out / "train.parquet").write_bytes(b"edited")
    assert validate.main(arguments) == 2 and "train.parquet: changed since" in capsys.readouterr().err
    assert (out / "train.parquet").read_bytes() == b"edited"


def test_a_quarantine_is_not_written_into_the_set_nor_over_it(tmp_path: Path, capsys: Any) -> None:
    bad = bad_set(tmp_path / "all" / "bad")
    before = (bad / "train.parquet").read_bytes()
    for out in (bad, bad / "good", tmp_path / "all", tmp_path):
        assert validate.main([str(bad), "--quarantine", str(out)]) == 2
        assert "another folder" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(bad)
    assert validate.main([str(bad), "--quarantine", str(tmp_path / "link")]) == 2
    assert (bad / "train.parquet").read_bytes() == before and [f.name for f in bad.iterdir()] == [
        "train.parquet"
    ]


def test_an_image_file_of_the_set_is_not_written_through_its_link(tmp_path: Path) -> None:
    bad, out = tmp_path / "bad", tmp_path / "good"
    data = rows(count=6)
    (bad / "images").mkdir(parents=True)
    (bad / "images" / "0.png").write_bytes(data[0]["image"]["bytes"])
    data[0]["image"] = {"bytes": None, "path": "images/0.png"}
    data[3]["answer"] = "Q"
    raw_write(data, bad / "train.parquet")
    for _ in range(2):
        assert validate.main([str(bad), "--quarantine", str(out)]) == 0
        assert (out / "images" / "0.png").samefile(bad / "images" / "0.png")
    assert (bad / "images" / "0.png").read_bytes() == rows(count=1)[0]["image"]["bytes"]


def test_the_first_finding_is_on_standard_error(tmp_path: Path, capsys: Any) -> None:
    assert validate.main([str(bad_set(tmp_path))]) == 2
    said = capsys.readouterr()
    assert f"{tmp_path}: not fit for training: train train-0-000000: answer: 'Q' is not" in said.err
    assert "BAD: answer: 1" in said.out


def test_prompts_that_cannot_be_rendered(tmp_path: Path, processor: Any) -> None:
    class Picky:
        """A processor whose template refuses some texts, as the model's own program may."""

        def __init__(self) -> None:
            self.tokenizer, self._get_num_multimodal_tokens = (
                processor.tokenizer,
                processor._get_num_multimodal_tokens,
            )

        def apply_chat_template(self, messages: Any, **more: Any) -> Any:
            if "forbidden" in messages[0]["content"][1]["text"]:
                raise TemplateError("no such word")
            return processor.apply_chat_template(messages, **more)

    data = rows(count=6)
    data[2]["question"] = "forbidden " + data[2]["question"]
    path = raw_write(data, tmp_path / "train.parquet")
    report = validate.validate([path], validate.Prompts(Picky(), 5000))
    assert [(f.kind, f.id, f.reason) for f in report.findings] == [
        ("prompt", "train-0-000002", f"in the {view} view: TemplateError: no such word")
        for view in ("full", "crop")
    ]


MARKED: dict[str, Callable[[dict], dict]] = {
    "marker left": lambda r: r | {"question": "<image>" + r["question"]},
    "image pad": lambda r: r | {"question": r["question"] + "<|image_pad|>"},
    "turn in an option": lambda r: r | {"options": [*r["options"][:3], "x<|im_start|>"]},
    "reasoning in an answer": lambda r: r | {"answer_type": "short", "answer": "<think>", "options": []},
    "end in a hint": lambda r: (
        r | {"hint": "See <|endoftext|>", "question": r["question"] + "See <|endoftext|>"}
    ),
}


@pytest.mark.parametrize("name", MARKED)
def test_a_control_token_is_told_and_does_not_block(name: str, tmp_path: Path) -> None:
    """The model is shown it as plain text (`vopd/common/control_tokens.py`)."""
    data = rows(count=12)
    data[7] = MARKED[name](data[7])
    report = validate.validate([raw_write(data, tmp_path / "train.parquet")])
    assert kinds(report) == {"marker": [data[7]["id"]]} and report.blocking == []
    assert report.warnings == {"marker": 1} and "warning: marker: 1" in report.text()


def test_special_tokens_of_the_model_are_looked_for(tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(BASE)
    data = rows(count=6)
    data[2]["question"] += " [INST]"
    path = raw_write(data, tmp_path / "train.parquet")
    assert validate.validate([path], validate.Prompts(processor, 5000)).findings == []
    processor.tokenizer.add_tokens(["[INST]"], special_tokens=True)
    assert kinds(validate.validate([path], validate.Prompts(processor, 5000))) == {
        "marker": ["train-0-000002"]
    }


def test_an_inline_image_of_too_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = rows(count=6)
    monkeypatch.setattr(schema, "MAX_BYTES", max(len(r["image"]["bytes"]) for r in data))
    data[3]["image"] = encoded(picture_of(data[3]["image"]), compress_level=0)
    path = raw_write(data, tmp_path / "train.parquet")
    assert kinds(validate.validate([path])) == {"size": ["train-0-000003"]}


def test_exit_codes_and_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    schema.write(rows(), good / "train.parquet")
    data = rows()
    data[0]["answer"] = "Q"
    raw_write(data, bad / "train.parquet")
    assert validate.main([str(good), "--model", str(BASE)]) == 0 and (good / validation_stamp.NAME).exists()
    assert validate.main([str(bad)]) == 2 and not (bad / validation_stamp.NAME).exists()
    assert validate.main([str(good / "train.parquet")]) == 0
    capsys.readouterr()
    for arguments in ([str(tmp_path / "none")], [str(tmp_path)], [str(good), "--model", str(tmp_path)]):
        assert validate.main(arguments) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("data.validate: ") and said.endswith(".")
    assert validate.main([str(bad), "--quarantine", str(bad)]) == 2
    assert "another folder" in capsys.readouterr().err


def test_a_column_of_another_type_is_named(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(rows(), schema=schema.FEATURES.arrow_schema)
    boxes = pa.array([["a", "b", "c", "d"]] * ROWS)
    table = table.set_column(table.schema.get_field_index("box"), "box", boxes)
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"train\.parquet: column 'box' is not"):
        validate.validate([tmp_path / "train.parquet"])


def test_a_row_is_in_memory_only_while_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema.write(rows(count=200), tmp_path / "train.parquet")
    alive = SimpleNamespace(now=0, most=0)

    class Counted(dict):
        def __init__(self, row: dict) -> None:
            super().__init__(row)
            alive.now += 1
            alive.most = max(alive.most, alive.now)

        def __del__(self) -> None:
            alive.now -= 1

    exact = schema.examined
    monkeypatch.setattr(schema, "examined", lambda path: map(Counted, exact(path)))
    validate.validate([tmp_path / "train.parquet"])
    assert 0 < alive.most <= 130


# ---- the stamp ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stamped(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        schema.write(rows(split, 6), tmp_path / f"{split}.parquet")
    assert validate.stamped(tmp_path).blocking == []
    return tmp_path


def test_a_stamp_holds_for_the_data_it_was_given_for(stamped: Path) -> None:
    assert set(validation_stamp.check(stamped, ["train"])) == {"train", "test"}
    moved = stamped.rename(stamped.with_name("moved"))
    validation_stamp.check(moved, ["train", "test"])
    with pytest.raises(UserError, match=r"holdout\.parquet: no such file"):
        validation_stamp.check(moved, ["train", "holdout"])
    schema.write(rows("test", 5), moved / "test.parquet")
    with pytest.raises(UserError, match="'test' is not the one that was validated"):
        validation_stamp.check(moved, ["train"])


def test_a_split_added_or_removed_later_is_seen(stamped: Path) -> None:
    schema.write(rows("validation", 6), stamped / "validation.parquet")
    with pytest.raises(UserError, match="'validation' is not the one"):
        validation_stamp.check(stamped, ["train"])
    (stamped / "validation.parquet").unlink()
    (stamped / "test.parquet").unlink()
    with pytest.raises(UserError, match=r"test\.parquet"):
        validation_stamp.check(stamped, ["train"])


@pytest.mark.parametrize("content", ["{", "[]", '{"checks": 1}', '{"checks": 1, "splits": {"train": 3}}'])
def test_no_stamp_and_no_real_stamp(stamped: Path, content: str) -> None:
    (stamped / validation_stamp.NAME).write_text(content)
    with pytest.raises(UserError, match="not a stamp"):
        validation_stamp.check(stamped, ["train"])
    (stamped / validation_stamp.NAME).unlink()
    with pytest.raises(UserError, match=f"never validated; run `vopd data validate {stamped}`"):
        validation_stamp.check(stamped, ["train"])


@pytest.mark.parametrize("content", ["mine", "[1]", '{"checks": 1}'])
def test_what_is_no_stamp_is_not_written_over(stamped: Path, content: str) -> None:
    (stamped / validation_stamp.NAME).write_text(content)
    for act in (validate.stamped, validation_stamp.remove):
        with pytest.raises(UserError, match="move it away, its name is needed"):
            act(stamped)
    assert (stamped / validation_stamp.NAME).read_text() == content


def test_new_checks_ask_for_a_new_validation(stamped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation_stamp, "CHECKS", validation_stamp.CHECKS + 1)
    with pytest.raises(UserError, match="another version of the checks"):
        validation_stamp.check(stamped, ["train"])


def test_a_stamp_is_taken_away_when_the_data_goes_bad(stamped: Path) -> None:
    data = rows("test", 6)
    data[0]["hint"] = ""
    raw_write(data, stamped / "test.parquet")
    assert validate.stamped(stamped).blocking and not (stamped / validation_stamp.NAME).exists()


def test_hashes_of_random_noise_do_not_collide() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), dtype=np.uint8)
    hashes = [validate.near_duplicates.perceptual_hash(Image.fromarray(p)) for p in pixels]
    assert list(validate.near_duplicates.near_pairs(np.array(hashes, dtype=np.uint64))) == []
