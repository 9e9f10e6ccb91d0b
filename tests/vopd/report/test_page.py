"""The page, its gallery and its files: complete, escaped, bounded, readable in a browser; and the small records."""

import base64
import io
import json
import re
import shutil
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from data import schema, validate, validation_stamp
from data.miniature import prepare
from vopd.common import ownership, provenance
from vopd.config import ROOT
from vopd.errors import UserError
from vopd.evaluation.records import read_records, write_records
from vopd.report import __main__ as report
from vopd.report import comparison, gallery, published, tables
from vopd.report.text_table import to_markdown

HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">{{ 7*7 }} & "quoted"'
KEPT = ROOT / "docs" / "results"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A validated data folder with pictures for the first questions."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in {"train": 4, "validation": 4, "test": 40, "holdout": 10}.items():
        schema.write(prepare.rows(split, count, 0), folder / f"{split}.parquet")
    assert not validate.stamped(folder).blocking
    return folder


@pytest.fixture(scope="session")
def runs(synthetic: ModuleType, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods over two seeds and an ablation, on the data's questions; one response is hostile."""
    folder = tmp_path_factory.mktemp("runs")
    splits = [path.stem for path in schema.splits(data)]
    facts = {
        "data_hash": provenance.hash_json(validation_stamp.check(data, splits)),
        "changed": {"data.folder": str(data)},
    }
    asked = synthetic.questions({"test": 40, "holdout": 10})
    for seed in range(2):
        synthetic.make_run(folder, "good", seed, fixed=0.9, asked=asked, **facts)
        synthetic.make_run(folder, "bad", seed, broken=0.7, fixed=0.2, asked=asked, **facts)
    synthetic.make_run(folder, "vision_opd_forward_kl", kind="ablations", fixed=0.5, asked=asked, **facts)
    for seed in range(2):
        file = folder / "good" / f"seed{seed}" / "records" / "after.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()]
        write_records(file, [r | {"response": HOSTILE} for r in records])
    return folder


@pytest.fixture(scope="session")
def made(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the three files."""
    out = tmp_path_factory.mktemp("out")
    assert report.main([str(runs), f"out={out}"]) == 0
    return out


def test_the_command_prints_the_main_table_and_writes_three_files(
    made: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = {file.name for file in made.glob("[!.]*")}
    assert shown == {"table.md", "report.html", "report.json"}
    assert report.main([str(runs / "good"), f"out={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "Methods: accuracy" in printed and "good is highest" in printed
    numbers = json.loads((made / "report.json").read_text())
    assert [row["name"] for row in numbers["tables"][0]["rows"]] == ["good", "bad"]
    assert len(numbers["runs"]) == 5 and numbers["published_by_the_paper"][0]["table"] == "2"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], ""),
        (["runs=x"], "not understood"),
        (["nowhere"], "There is no folder nowhere"),
        (["mixed=true"], "No runs were named"),
        ([".", "mixed=maybe"], "mixed=maybe"),
    ],
)
def test_bad_arguments_end_with_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_what_records_say_is_escaped_and_nothing_is_loaded_from_elsewhere(made: Path) -> None:
    page = (made / "report.html").read_text()
    assert "window.hacked=1" in page  # it is there, as text
    assert "<img src=x" not in page and "</script><script>window" not in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert page.count("<script>") == 1 and "default-src 'none'" in page
    assert "<script>" not in (made / "table.md").read_text()


def test_published_figures_stand_apart(made: Path, runs: Path) -> None:
    for sheet in tables.sheets(comparison.make([runs])):
        text = json.dumps([sheet.rows, sheet.columns])
        assert ("92.15" in text) <= sheet.published
        assert sheet.published == sheet.title.startswith("PUBLISHED, not ours")
    assert "PUBLISHED, not ours: Table 4" in (made / "table.md").read_text()  # an ablation of it was run
    assert "PUBLISHED, not ours: Table 3" not in (made / "table.md").read_text()


def test_published_means_agree_with_the_averages_the_paper_prints() -> None:
    """Tables 3 to 6 print an average; the paper's text holds these."""
    printed = {
        "3": [0.51, 75.43, 75.28, 75.70], "4": [74.77, 74.42, 75.70], "5": [74.56, 75.70], "6": [74.89, 75.70],
    }  # fmt: skip
    found = {t.table: [t.mean(row) for row in t.rows] for t in published.read() if t.table in printed}
    for table, means in printed.items():
        assert found[table] == pytest.approx(means, abs=0.0051)
    assert all(len(row.values) == len(t.columns) for t in published.read() for row in t.rows)


def test_every_published_recipe_is_one_of_ours() -> None:
    ours = {path.stem for path in (ROOT / "recipes").rglob("*.yaml")}
    assert {name for t in published.read() for row in t.rows for name in row.recipes} <= ours


# ---- gallery -------------------------------------------------------------------------------------------------------


def test_the_gallery_holds_what_changed_with_its_pictures(runs: Path) -> None:
    c = comparison.make([runs])
    made = gallery.make(c.groups)
    assert made.why == ""
    good = next(g for g in c.groups if g.name == "good")
    fixed = [card for card in made.cards if (card.method, card.outcome) == ("good", "fixed")]
    verdicts = [
        {(r.split, r.id): r.correct for r in records if r.view == "full"}
        for records in (good.runs[0].before, *(run.after for run in good.runs))
    ]
    both = {
        key for key, right in verdicts[0].items() if not right and all(after[key] for after in verdicts[1:])
    }
    assert {(card.split, card.id) for card in fixed} == both and made.totals["good", "fixed"] == len(both) > 5
    for card in fixed:
        assert card.image and card.crop and card.seeds == "2 of 2" and card.after == HOSTILE
        picture = Image.open(io.BytesIO(base64.b64decode(made.pictures[card.image].split(",", 1)[1])))
        assert picture.size == (128, 128)


def test_the_gallery_is_bounded_and_its_choice_seeded(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = comparison.make([runs]).groups

    def shown(seed: int) -> list[str]:
        cards = gallery.make(groups, shown=3, seed=seed).cards
        assert (
            max(
                sum((c.method, c.outcome) == key for c in cards)
                for key in {(c.method, c.outcome) for c in cards}
            )
            == 3
        )
        return [card.id for card in cards]

    assert shown(0) == shown(0) != shown(1)
    monkeypatch.setattr(gallery, "PAGE_BYTES", 100_000)
    few = gallery.make(groups)
    assert sum(len(base64.b64decode(uri.split(",", 1)[1])) for uri in few.pictures.values()) <= 100_000
    assert few.pictures and "left out" in few.why
    assert any(card.image is None for card in few.cards)


def test_large_pictures_are_shrunk() -> None:
    noise = Image.effect_noise((1600, 900), 90).convert("RGB")
    kind, content = gallery._small(schema.encode(noise), Path())
    assert kind == "image/jpeg" and len(content) <= gallery.PICTURE_BYTES
    width, height = Image.open(io.BytesIO(content)).size
    assert width <= gallery.SIDE and width / height == pytest.approx(16 / 9, rel=0.02)


def test_small_pictures_are_shown_as_the_models_saw_them() -> None:
    small = Image.effect_noise((60, 40), 90)
    assert gallery._small(schema.encode(small), Path()) == ("image/png", schema.encode(small)["bytes"])
    media, content = gallery._small(schema.encode(Image.new("RGBA", (60, 40), (255, 0, 0, 0))), Path())
    shown = Image.open(io.BytesIO(content))
    assert (media, shown.mode, shown.getpixel((3, 3))) == ("image/png", "RGB", (255, 255, 255))


def test_without_the_runs_data_there_are_texts_and_a_reason(
    runs: Path, synthetic: ModuleType, tmp_path: Path, data: Path
) -> None:
    asked = synthetic.questions({"test": 40, "holdout": 10})
    other = synthetic.make_run(tmp_path, "other", fixed=0.9, asked=asked, changed={"data.folder": str(data)})
    made = gallery.make(comparison.make([other]).groups)
    assert made.cards and not made.pictures and "is not what the runs were made from" in made.why
    gone = synthetic.make_run(tmp_path, "gone", fixed=0.9, asked=asked)
    assert "prepare it" in gallery.make(comparison.make([gone]).groups).why


# ---- in a browser --------------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_the_page_works_in_chromium(made: Path, browser: ModuleType) -> None:
    if why := browser.missing():
        pytest.skip(why)
    shown = "return [...document.querySelectorAll('.card:not([hidden])')].map(c => c.dataset)"

    def choose(name: str, value: str) -> None:
        window.run(
            f"const s = document.querySelector('#filters select[name={name}]'); s.value = '{value}'; "
            "s.dispatchEvent(new Event('change'))"
        )

    with browser.Browser() as window:
        for width in (1280, 390):
            window.open(made / "report.html", width)
            assert window.run("return innerWidth") == width
            assert window.run("return document.documentElement.scrollWidth") <= width
            cards = window.run(shown)
            assert cards and {(c["method"], c["outcome"]) for c in cards} == {("good", "fixed")}
            response = "return document.querySelector('.card:not([hidden]) dd:last-of-type').textContent"
            assert window.run(response) == HOSTILE
            choose("method", "bad")
            choose("outcome", "broken")
            assert {(c["method"], c["outcome"]) for c in window.run(shown)} == {("bad", "broken")}
            choose("split", "holdout")
            assert {c["split"] for c in window.run(shown)} == {"holdout"}
            choose("family", "digit")
            assert window.run(shown) == []
            choose("family", "")
            choose("split", "")
            decoded = "return Promise.all([...document.images].filter(i => i.src).map(i => i.decode()))"
            assert len(window.run(decoded)) > 10  # fails where a picture does not load
            assert window.run("return window.hacked === undefined")
            assert window.complaints() == []


# ---- small records -------------------------------------------------------------------------------------------------


def accuracies(paths: list[Path]) -> dict[str, str]:
    """Each kind's table of accuracies in Markdown, without heading and notes."""
    found = [s for s in tables.sheets(comparison.make(paths)) if s.key.startswith("accuracy-")]
    return {
        sheet.key.removeprefix("accuracy-"): "\n".join(
            line for line in to_markdown(sheet).splitlines() if line.startswith("|")
        )
        for sheet in found
    }


def test_kept_records_give_the_same_tables(runs: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    assert report.main([str(runs), f"out={tmp_path / 'out'}", f"keep={kept}"]) == 0
    assert accuracies([kept]) == accuracies([runs])
    run = kept / "miniature" / "good" / "seed0"
    assert (kept / "miniature" / "ablations" / "vision_opd_forward_kl" / "seed0" / "summary.json").is_file()
    before = {file: file.read_bytes() for file in kept.rglob("*") if file.is_file()}
    assert "/nowhere" not in (run / "summary.json").read_text()
    assert (
        json.loads((run / "summary.json").read_text())["run"]["settings"]["model"]["path"]
        == "data/miniature/base"
    )
    assert report.main([str(runs), f"out={tmp_path / 'out'}", f"keep={kept}"]) == 0
    assert {file: file.read_bytes() for file in kept.rglob("*") if file.is_file()} == before
    assert report.main([str(kept), f"out={tmp_path / 'out'}", f"keep={kept}"]) == 2  # onto themselves


def test_another_record_is_not_replaced(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(runs / "good" / "seed0"), f"out={tmp_path / 'out'}", f"keep={tmp_path / 'kept'}"]
    assert report.main(arguments) == 0
    run = tmp_path / "kept" / "miniature" / "good" / "seed0"
    (run / "notes.md").write_text("mine")
    capsys.readouterr()
    assert report.main(arguments) == 2
    assert f"{run}: holds something other than the record of" in capsys.readouterr().err
    assert (run / "notes.md").read_text() == "mine"
    (run / "notes.md").unlink()
    assert report.main(arguments) == 0
    assert [f.name for f in run.parent.iterdir()] == ["seed0"]  # no temporary folder is left


def test_a_report_is_written_over_a_report_and_nothing_else(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(made, tmp_path / "out"))
    (out / ownership.LEDGER).unlink()  # as an earlier version left it
    check = partial(ownership.check, out, report.MAKER, tuple(report.NAMES), recognise=report._made_before)
    check()
    ownership.claim(out, report.MAKER, tuple(report.NAMES), recognise=report._made_before)
    (out / "notes.md").write_text("mine")
    check()
    (out / "table.md").write_text("# Comparison\n\nwith my remarks\n")
    assert report.main(["nowhere", f"out={out}"]) == 2
    assert "table.md: changed since vopd.report made it" in capsys.readouterr().err


def test_broken_packed_records_are_named(runs: Path, tmp_path: Path) -> None:
    report.main([str(runs / "good" / "seed0"), f"out={tmp_path / 'out'}", f"keep={tmp_path / 'kept'}"])
    file = tmp_path / "kept" / "miniature" / "good" / "seed0" / "records" / "after.jsonl.gz"
    whole = read_records(file.with_suffix("")).records
    assert len(whole) == 90
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"after\.jsonl\.gz is not a whole gzip file"):
        read_records(file.with_suffix(""))


@pytest.mark.skipif(not KEPT.is_dir(), reason="no run records are in docs/results")
def test_the_documents_show_the_tables_of_the_committed_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vopd.evaluation.statistics.RESAMPLES", 9999)
    tables_of = accuracies([KEPT])
    assert tables_of["methods"] in (ROOT / "README.md").read_text()
    assert tables_of["ablations"] in (ROOT / "docs" / "methods" / "ablations.md").read_text()


# ---- names from outside --------------------------------------------------------------------------------------------


def renamed(runs: Path, folder: Path, **facts: str) -> Path:
    """A copy of a run that says other things about itself."""
    run = folder / "given" / "seed0"
    shutil.copytree(runs / "good" / "seed0", run)
    summary = json.loads((run / "summary.json").read_text())
    summary["run"] |= facts
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def test_names_from_a_summary_are_text_everywhere(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "x|\n|y <img src=x onerror=1> [a](javascript:1) `b` $\\frac$ \x1b]52;c;eA==\x07\u202e[/red]"
    run = renamed(runs, tmp_path, recipe=name, profile="</title><script>1</script>")
    assert report.main([str(run), f"out={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\x07" not in printed and "\u202e" not in printed
    page, table = ((tmp_path / "out" / file).read_text() for file in ("report.html", "table.md"))
    assert "<img src=x" not in page and "</title><script>" not in page and page.count("<script>") == 1
    assert "<img" not in table and "](" not in table and "\x1b" not in table
    pipes = {
        len(re.findall(r"(?<!\\)\|", line)) for line in table.split("## ")[1].splitlines() if line[:1] == "|"
    }
    assert len(pipes) == 1  # every row of the table has as many cells


@pytest.mark.parametrize(
    "facts", [{"recipe": "../../x"}, {"profile": "../.."}, {"recipe": ".."}, {"recipe": "/x"}]
)
def test_a_summary_does_not_choose_where_its_record_is_kept(
    runs: Path, tmp_path: Path, facts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = renamed(runs, tmp_path, **facts)
    assert report.main([str(run), f"out={tmp_path / 'out'}", f"keep={tmp_path / 'a' / 'kept'}"]) == 2
    assert "that is not a valid name" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"given", "out"}
