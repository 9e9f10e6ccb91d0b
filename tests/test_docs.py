"""What the documents say can be done: their commands, settings, links, files and tests exist; their example works."""

import json
import re
import shlex
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage
import torch
from PIL import Image

from data import audit, schema, validate
from data.miniature import prepare as miniature
from data.synthesis.config import load as synthesis_settings
from data.vision_opd_6k import prepare as vision_opd_6k
from vopd import cli
from vopd.config import ROOT, load
from vopd.errors import UserError
from vopd.evaluation.benchmark import FOLDER, find
from vopd.evaluation.evaluate import settings_of
from vopd.evaluation.scoring import table as scoring_table
from vopd.method import Method, ScoreChunk, UpdateBatch, build
from vopd.report import __main__ as report
from vopd.report.__main__ import parse_arguments as report_arguments
from vopd.runner import series

METHODS = sorted((ROOT / "docs" / "methods").glob("*.md"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), ROOT / "recipes" / "README.md", *METHODS]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS.append(ROOT / "data" / "miniature" / "base" / "README.md")
EXAMPLE = ROOT / "docs" / "adding_a_recipe.md"
OWN = ("recipes", "vopd", "data", "scripts", "tests", "docs", "requirements", "baselines")


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def blocks(document: Path, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)


def inline(document: Path) -> list[str]:
    """Text in single backticks, fenced blocks aside; a line break counts as a space."""
    prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def commands(document: Path) -> list[list[str]]:
    """The arguments of every `bash ...` and `python ...` command, in blocks and in prose."""
    lines = [
        line
        for language in ("bash", "")
        for block in blocks(document, language)
        for line in block.split("\n")
    ]
    found = [line for line in lines + inline(document) if re.match(r"(bash|python|vopd) ", line)]
    return [shlex.split(line, comments=True) for line in found]


def refusals(document: Path) -> list[str]:
    """Commands that name no script or module of ours, or settings that a run does not take."""
    wrong = []
    for words in commands(document):
        line = " ".join(words)
        if words[0] == "python":
            wrong += refused_module(words) if "-m" in words else refused_script(words)
        elif words[0] == "vopd":
            wrong += refused_command(words)
        elif not (ROOT / words[1]).is_file():
            wrong.append(f"{line}: no such script")
        elif words[1] == "scripts/run_recipe.sh" and words[2] != "--help":
            recipe = "vision_opd" if words[2].endswith(".yaml") else words[2]  # the example is loaded below
            load(recipe, [word for word in words[3:] if word != "--help"])
        elif words[1] == "scripts/compare.sh":
            recipes, seeds, settings = series.parse_arguments(words[2:])
            for recipe in recipes:
                load(recipe, [*settings, f"seed={seeds[0]}"])
    return wrong


def refused_module(words: list[str]) -> list[str]:
    name = words[words.index("-m") + 1]
    return [] if find_spec(name) is not None else [f"{' '.join(words)}: no such module"]


def refused_command(words: list[str]) -> list[str]:
    """A command of `vopd` that is not there, or whose settings it does not take."""
    if words[1].isupper() or words[1:] == ["--help"]:  # COMMAND stands for one
        return []
    command, rest = words[1:2], words[2:]
    if rest and isinstance(cli.cli.commands.get(command[0]), click.Group):
        command, rest = words[1:3], words[3:]
    found: click.Command | None = cli.cli
    for name in command:
        found = found.commands.get(name) if isinstance(found, click.Group) else None
    if found is None:
        return [f"{' '.join(words)}: no such command"]
    if not rest or rest == ["--help"] or any(word.isupper() for word in rest):  # FOLDER stands for one
        return []
    checks = {
        "data synthesize": synthesis_settings,
        "data audit": lambda rest: audit.arguments().parse_args(cli._as_options(tuple(rest))),
        "report": report_arguments,
        "evaluate": lambda rest: [find(benchmark) for benchmark in settings_of(rest).benchmarks],
        "run": lambda rest: load(rest[0], rest[1:]),
        "check": lambda rest: load(rest[0], rest[1:]),
        "compare": series.parse_arguments,
    }
    if check := checks.get(" ".join(command)):
        check(rest)
    return []


def ended(words: list[str]) -> int:
    """The exit code of `vopd` with these arguments, in this process."""
    with pytest.raises(SystemExit) as end:
        cli.cli(words[1:], prog_name="vopd")
    return int(end.value.code or 0)


def refused_script(words: list[str]) -> list[str]:
    return [] if (ROOT / words[1]).is_file() else [f"{' '.join(words)}: no such script"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_name_what_exists_and_settings_that_a_run_takes(document: Path) -> None:
    assert refusals(document) == []


def test_a_command_that_does_not_exist_is_seen(tmp_path: Path) -> None:
    document = tmp_path / "x.md"
    document.write_text(
        "Try `python -m vopd.nothing` or `vopd data nothing`:\n```bash\nbash scripts/nothing.sh   # now\n```\n"
    )
    assert [line.split(":")[0] for line in refusals(document)] == [
        "bash scripts/nothing.sh",
        "python -m vopd.nothing",
        "vopd data nothing",
    ]


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("vopd data synthesize out=x licenze=y", UserError),
        ("vopd data audit a.parquet", SystemExit),
    ],
)
def test_an_argument_that_a_command_does_not_take_is_refused(
    tmp_path: Path, command: str, error: type
) -> None:
    document = tmp_path / "x.md"
    document.write_text(f"```bash\n{command}\n```\n")
    with pytest.raises(error):
        refusals(document)


def test_the_two_commands_are_among_them() -> None:
    assert ["bash", "scripts/run_recipe.sh", "vision_opd"] in commands(ROOT / "README.md")
    assert ["bash", "scripts/test.sh"] in commands(ROOT / "README.md")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_inside_the_repository_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_named_in_the_text_exist(document: Path) -> None:
    named = [code for code in inline(document) if re.fullmatch(rf"({'|'.join(OWN)})/[\w./-]+\.\w+", code)]
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_tests_named_in_the_method_cards_exist() -> None:
    code = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    named = [word for page in METHODS for word in inline(page) if word.startswith("test_")]
    assert len(named) > 30
    assert [name for name in named if f"def {name}(" not in code] == []


def test_every_recipe_has_its_row_in_the_index_and_its_page() -> None:
    index = (ROOT / "recipes" / "README.md").read_text()
    recipes = [file.stem for file in (ROOT / "recipes").glob("*.yaml")]
    pages = {
        name: re.search(rf"^\| `{name}` \| [^|]+\. \| \[\w+\]\(\.\./([^)#]+)", index, re.M)
        for name in recipes
    }
    assert [
        name
        for name, found in pages.items()
        if not found or f"{name}.yaml" not in (ROOT / found[1]).read_text()
    ] == []
    variants = [
        file for kind in ("ablations", "controls") for file in (ROOT / "recipes" / kind).glob("*.yaml")
    ]
    # A row names the first of its recipes whole, the others by what they do not share with it.
    named = [
        name.split("/")[-1].removeprefix("..._")
        for name in inline(ROOT / "docs" / "methods" / "ablations.md")
    ]
    assert variants
    assert [f.stem for f in variants if not any(f.stem == n or f.stem.endswith(f"_{n}") for n in named)] == []


def test_the_card_states_the_settings_of_a_run() -> None:
    paper, miniature = load("vision_opd", ["profile=qwen3_5_4b_8gpu"]), load("vision_opd", [])
    card = (ROOT / "docs" / "methods" / "vision_opd.md").read_text()
    rows = re.findall(r"^\| `(\w+\.\w+)` \| ([^|]+) \| ([^|]+) \|", card, re.M)
    assert len(rows) > 5
    for key, *stated in rows:
        section, name = key.split(".")
        given = [str(config[section][name]) for config in (paper, miniature)]
        assert [text.replace(",", "") for text in stated] == given, key


def helper(path: str) -> ModuleType:
    """A module below tests/ that is not a test; pytest's importlib mode puts no folder on the path."""
    spec = spec_from_file_location(Path(path).stem, ROOT / "tests" / path)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- the commands of docs/data.md ----------------------------------------------------------------------------------


def test_the_commands_of_the_data_page_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With fewer rows, a folder of the published layout for /data/published, and .cache in a temporary place."""
    layout = helper("data/published_layout.py")
    layout.build(tmp_path / "published", 32)
    monkeypatch.setattr(miniature, "ROWS", {"train": 24, "validation": 4, "test": 4, "holdout": 4})
    monkeypatch.setattr(vision_opd_6k, "DEFAULTS", {"validation": 4, "test": 4, "seed": 0})
    run = [words for words in commands(ROOT / "docs" / "data.md") if words[0] == "vopd"]
    assert {" ".join(words[1:3]) for words in run} == {"data prepare", "data validate"} and len(run) > 3
    monkeypatch.chdir(ROOT)
    for words in run:
        places = {"/data/published": tmp_path / "published", ".cache": tmp_path / "cache"}
        for stated, place in places.items():
            words = [re.sub(rf"^(\w+=)?{re.escape(stated)}", rf"\g<1>{place}", word) for word in words]
        assert ended(words) == 0, (words, capsys.readouterr())
    assert (tmp_path / "cache" / "vision_opd_6k" / "validated.json").is_file()


def test_the_data_page_names_every_kind_and_column() -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| (yes|no) \|", page, re.MULTILINE)
    kinds = dict.fromkeys(validate.BLOCKING, "yes") | dict.fromkeys(validate.WARNING, "no")
    assert dict(rows) == kinds and len(rows) == len(kinds)
    assert [column for column in schema.COLUMNS if f"`{column}`" not in page] == []


# ---- the commands of docs/synthesis.md -----------------------------------------------------------------------------


def test_the_commands_of_the_synthesis_page_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a temporary folder, against the stand-in server, with smaller photographs than the default asks for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photographs").mkdir()
    (tmp_path / "benchmarks").mkdir()
    photograph = Image.open(Path(skimage.__file__).parent / "data" / "coffee.png")
    photograph.save("photographs/1.jpg", quality=95)
    cells = [schema.encode(picture) for picture in (photograph.resize((300, 200)), photograph.rotate(90))]
    pq.write_table(pa.table({"id": ["copy", "other"], "image": cells}), "benchmarks/vstar.parquet")
    blocks_run = [words for words in commands(ROOT / "docs" / "synthesis.md") if "--help" not in words]
    with helper("data/synthesis/stub_server.py").StubServer() as stub:
        more = [f"server.base_url={stub.url}", "filter.min_width=300", "filter.min_height=300"]
        called = [" ".join(words[1:3]) for words in blocks_run if words[0] == "vopd"]
        assert called == ["data synthesize", "data validate", "data audit"]
        for words in blocks_run:
            if words[0] == "vopd":
                given = [*more, "propose.per_image=1"] if words[2] == "synthesize" else []
                assert ended([*words, *given]) == 0, words
    record = json.loads((tmp_path / "audits" / "vstar" / "excluded.json").read_text())
    assert (record["benchmark"], record["excluded"]) == ("V*", ["copy"])
    [example] = blocks(ROOT / "docs" / "synthesis.md", "json")
    assert list(json.loads(example)) == list(record)


# ---- docs/evaluation.md ---------------------------------------------------------------------------------------------

EVALUATION = ROOT / "docs" / "evaluation.md"


def test_the_table_of_scoring_rules_is_what_its_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = [words for words in commands(EVALUATION) if "vopd.evaluation.scoring.table" in words]
    assert scoring_table.main([str(ROOT / command[3])]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") > 10 and printed in EVALUATION.read_text()


def test_every_benchmark_is_documented_with_its_number_of_questions() -> None:
    text = EVALUATION.read_text()
    for file in FOLDER.glob("*.yaml"):
        (row,) = [line for line in text.split("\n") if line.startswith("|") and f"`{file.stem}`" in line]
        assert f"{find(file.stem)[1].rows:,}" in row


# ---- docs/testing.md ------------------------------------------------------------------------------------------------


def test_the_testing_page_counts_the_rows_and_names_every_marker(pytestconfig: pytest.Config) -> None:
    page = (ROOT / "docs" / "testing.md").read_text()
    rows = (ROOT / "tests/vopd/evaluation/crafted_responses.jsonl").read_text().count("\n")
    assert f"holds {rows:,} model responses" in page
    for marker in ("distributed", "e2e"):
        assert any(line.startswith(f"{marker}:") for line in pytestconfig.getini("markers"))
        assert f"| `{marker}` |" in page


# ---- docs/comparing.md ----------------------------------------------------------------------------------------------

COMPARING = ROOT / "docs" / "comparing.md"


def test_the_commands_of_the_comparing_page_run_on_made_up_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a temporary folder with a run where the page names one."""
    synthetic = helper("vopd/report/synthetic.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOPD_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("vopd.evaluation.statistics.RESAMPLES", 199)
    for recipe in ("vision_opd", "grpo"):
        synthetic.make_run(tmp_path / "runs" / "miniature", recipe, fixed=0.3)
    run = [words for words in commands(COMPARING) if words[:2] == ["vopd", "report"]]
    assert len(run) == 3
    for words in run:
        assert ended(words) == 0, words
    named = re.findall(r"^\| `(\w+\.\w+)` \|", COMPARING.read_text(), re.MULTILINE)
    made = {file.name for file in (tmp_path / "runs" / "two").iterdir() if not file.name.startswith(".")}
    assert made == set(named)
    assert len(list((tmp_path / "docs" / "results").rglob("summary.json"))) == 2
    assert report.main(["docs/results", "out=again"]) == 0


# ---- the example of docs/adding_a_recipe.md ------------------------------------------------------------------------


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The recipe's path, outside the repository; every block is written under the name on its first line."""
    for block in blocks(EXAMPLE, "yaml") + blocks(EXAMPLE, "python"):
        name = re.match(r"# (\w+\.\w+)\n", block)
        assert name, block[:40]
        (tmp_path / name[1]).write_text(block)
    return next(tmp_path.glob("*.yaml"))


def built(recipe: Path, words: list[str]) -> Method:
    config = load(str(recipe), words)
    return build(dict(config.method), Path(config.recipe_folder))


def test_the_example_recipe_loads_and_keeps_the_profiles_budget(example: Path) -> None:
    config, default = load(str(example), ["seed=3"]), load("vision_opd", [])
    assert (config.recipe, config.seed, config.train.lr) == ("frozen_crop", 3, 1e-4)
    assert (config.train.steps, config.train.prompts) == (default.train.steps, default.train.prompts)
    method = built(example, ["method.view=noise"])
    assert (method.scorers["teacher"].view, method.scorers["teacher"].weights) == ("noise", "initial")
    assert set(method.record()) == {"anchor", "objective", "normalisation", "clip"}


def test_the_example_module_scores_and_its_loss_is_the_forward_kl(example: Path) -> None:
    method = built(example, [])
    generator = torch.Generator().manual_seed(0)
    student_CV = torch.randn(6, 9, generator=generator).requires_grad_()
    teacher_CV = torch.randn(6, 9, generator=generator)
    scored = method.score(
        ScoreChunk(student_CV, {"teacher": teacher_CV}, torch.zeros(6, dtype=torch.long), {})
    )
    assert tuple(scored) == method.outputs
    expected = torch.nn.functional.kl_div(
        student_CV.log_softmax(-1), teacher_CV.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(scored["forward_kl"], expected)
    per_token = {"forward_kl": scored["forward_kl"].view(2, 3)}
    mask_BT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    loss = method.loss(per_token, mask_BT, UpdateBatch(rows=2, tokens=4, ranks=1))
    torch.testing.assert_close(loss, expected[:4].mean())
    loss.backward()
    assert student_CV.grad is not None and bool(torch.isfinite(student_CV.grad).all())
    assert bool((student_CV.grad[:4] != 0).any()) and not bool((student_CV.grad[4:] != 0).any())
