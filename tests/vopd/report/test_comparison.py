"""What was put into made-up runs is found: effects, chance, ranks, tokens, cost; incomparable runs are refused."""

import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from vopd.errors import UserError
from vopd.evaluation import statistics
from vopd.evaluation.records import read_records, write_records
from vopd.report import comparison, tables
from vopd.report.comparison import Comparison
from vopd.report.run_summary import summarise
from vopd.report.text_table import Sheet, to_markdown

MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def three(synthetic, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A strong method, one without any effect, one that harms, over three seeds; one ablation and one control."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(3):
        synthetic.make_run(folder, "strong", seed, fixed=0.5)
        synthetic.make_run(folder, "nothing", seed, tokens=200)
        synthetic.make_run(folder, "harmful", seed, broken=0.3)
        synthetic.make_run(folder, "strong_weakened", seed, kind="ablations", fixed=0.1)
        synthetic.make_run(folder, "strong_noise", seed, kind="controls")
    return comparison.make([folder])


def sheet(c: Comparison, key: str) -> Sheet:
    return next(s for s in tables.sheets(c) if s.key == key)


def cells(c: Comparison, key: str, row: str) -> dict[str, str]:
    """Column -> cell; the first of two columns of one name."""
    found = sheet(c, key)
    (line,) = [line for line in found.rows if line[0] == row]
    return dict(reversed(list(zip(found.columns, line, strict=True))))


def test_effects_are_found_and_nothing_is_nothing(three: Comparison) -> None:
    strong, nothing, harmful = (three.rows[name] for name in ("strong", "nothing", "harmful"))
    wrong = 1 - three.main.base.measures["full"].value
    change = strong.measures["full"].change
    assert change.value == pytest.approx(0.5 * wrong, abs=0.06)
    assert change.low > 0.1 and strong.measures["full"].p_holm < 0.03
    assert strong.measures["gap"].change.value == pytest.approx(-change.value)
    assert strong.gap_closed and strong.gap_closed.value == pytest.approx(
        change.value / three.main.base.measures["gap"].value
    )
    assert harmful.measures["full"].change.high < 0 and harmful.measures["full"].p_holm < 0.03
    for measure in nothing.measures.values():  # the same answers as base: no difference at all
        assert measure.change.value == 0 and measure.p_holm == 1
    assert strong.measures["crop"].p_holm == 1


def test_ranks_and_the_difference_to_the_best(three: Comparison) -> None:
    assert [row.name for row in three.main.rows] == ["strong", "nothing", "harmful"]
    assert [row.rank for row in three.main.rows] == [1, 2, 4]  # base and `nothing` share the second place
    assert three.main.base.rank == 2
    strong, nothing = three.rows["strong"], three.rows["nothing"]
    assert strong.against is None
    assert nothing.against and nothing.against.name == "strong" and nothing.against.seeds == [0, 1, 2]
    assert nothing.against.difference.value == pytest.approx(-strong.measures["full"].change.value)
    assert "Significantly below it: nothing, harmful." in tables.verdict(three)


def test_ablations_and_controls_stand_against_the_recipe_they_vary(three: Comparison) -> None:
    assert [table.kind for table in three.tables] == ["methods", "ablations", "controls"]
    for name in ("strong_weakened", "strong_noise"):
        against = three.rows[name].against
        assert against and against.name == "strong" and against.difference.high < 0
    assert "Compared with strong: strong_weakened." in sheet(three, "accuracy-ablations").notes
    assert "strong_weakened" not in {row.name for row in three.main.rows}


def test_p_values_are_corrected_over_the_table(three: Comparison) -> None:
    raw = {(r.name, m): v.change.p_value for r in three.main.rows for m, v in r.measures.items()}
    given = {(r.name, m): v.p_holm for r in three.main.rows for m, v in r.measures.items()}
    assert len(raw) == 12
    ordered = sorted(raw, key=lambda key: raw[key])
    steps = [min(1.0, (len(raw) - i) * raw[key]) for i, key in enumerate(ordered)]
    for key, wanted in zip(ordered, itertools.accumulate(steps, max), strict=True):
        assert given[key] == pytest.approx(wanted)
    assert given["strong", "full"] > raw["strong", "full"]


def test_chance_alone_is_rarely_called_an_effect(synthetic, tmp_path: Path) -> None:
    """Methods that change as many answers for the better as for the worse."""
    for n in range(6):
        for seed in range(2):
            synthetic.make_run(tmp_path, f"chance{n}", seed, fixed=0.12, broken=0.08)
    c = comparison.make([tmp_path])
    found = [row.measures["full"].p_holm for row in c.main.rows]
    assert sum(p < 0.05 for p in found) <= 1


def test_one_seed_agrees_with_the_runs_own_summary(synthetic, tmp_path: Path) -> None:
    run = synthetic.make_run(tmp_path, fixed=0.3, broken=0.05)
    own = {row.name: row for row in summarise(run, {}).rows}
    synthetic.make_run(tmp_path, fixed=0.3, broken=0.05)  # the line above has rewritten its summary
    row = comparison.make([tmp_path]).rows["alpha"]
    for name, measure in row.measures.items():
        assert (measure.after.value, measure.after.low) == (
            own[name].after.value,
            own[name].after.low,
        ) or name == "gap"
        assert measure.change == own[name].change
        assert measure.p_holm == pytest.approx(own[name].p_holm)


def test_seeds_that_differ_widen_the_interval(synthetic, tmp_path: Path) -> None:
    for seed, fixed in enumerate((0.0, 0.4, 0.8)):
        synthetic.make_run(tmp_path, "alike", seed, fixed=0.4)
        synthetic.make_run(tmp_path, "apart", seed, fixed=fixed)
    rows = comparison.make([tmp_path]).rows
    widths = {n: (d := row.measures["full"].change).high - d.low for n, row in rows.items()}
    assert widths["apart"] > 1.5 * widths["alike"]


def test_methods_meet_on_the_seeds_they_share(synthetic, tmp_path: Path) -> None:
    for recipe, seeds in (("best", (0, 1)), ("half", (1, 2)), ("alone", (5,))):
        for seed in seeds:
            synthetic.make_run(tmp_path, recipe, seed, fixed=0.6 if recipe == "best" else 0.1)
    c = comparison.make([tmp_path])
    half = c.rows["half"].against
    assert half and half.seeds == [1]
    assert c.rows["alone"].against is None
    assert any("share the seeds 1 alone" in note for note in sheet(c, "accuracy-methods").notes)


def test_base_answers_that_differ_are_averaged_and_said(synthetic, tmp_path: Path) -> None:
    synthetic.make_run(tmp_path, "one", fixed=0.2)
    other = synthetic.make_run(tmp_path, "two", fixed=0.2)
    assert comparison.make([tmp_path]).main.base.answered == 1
    file = other / "records" / "before.jsonl"
    records = read_records(file).records
    flipped = next(r for r in records if r.view == "full" and not r.correct)
    write_records(
        file,
        [
            r if r is not flipped else synthetic.record((r.split, r.id, r.family), "full", True, "I")
            for r in records
        ],
    )
    c = comparison.make([tmp_path])
    assert c.main.base.answered == 2
    assert any("2 different sets of answers" in note for note in sheet(c, "accuracy-methods").notes)


# ---- tokens, cost, failures ----------------------------------------------------------------------------------------


def test_equal_tokens_interpolates_between_validation_points(three: Comparison, synthetic) -> None:
    """strong and harmful: 300 and 600 tokens at their two points; nothing: 600 and 1,200. Equal at 600."""
    assert three.tokens.tokens == 600
    run = next(r for r in three.runs if r.recipe == "strong" and r.seed == 0)
    last = [r.correct for r in run.validation[6] if r.view == "full"]
    seeds = [r for r in three.runs if r.recipe == "strong"]
    mean = sum(sum(x.correct for x in r.validation[6] if x.view == "full") / len(last) for r in seeds) / 3
    assert three.tokens.full["strong"].value == pytest.approx(mean)
    assert "at 600 generated tokens" in sheet(three, "tokens").title


def test_a_value_between_two_points_lies_between_them(synthetic, tmp_path: Path) -> None:
    synthetic.make_run(tmp_path, "slow", fixed=0.9, tokens=100, validated=(2, 6))  # 200, 600
    synthetic.make_run(tmp_path, "fast", fixed=0.9, tokens=200, validated=(1, 2))  # 200, 400
    c = comparison.make([tmp_path])
    slow = next(r for r in c.runs if r.recipe == "slow")
    ends = [sum(x.correct for x in slow.validation[s] if x.view == "full") / 40 for s in (2, 6)]
    assert c.tokens.tokens == 400
    assert ends[0] < c.tokens.full["slow"].value < ends[1]
    assert c.tokens.full["slow"].value == pytest.approx(sum(ends) / 2)


@pytest.mark.parametrize(
    ("tokens", "validated", "said"), [(900, (3, 6), "no equal number"), (100, (), "No validation")]
)
def test_where_there_are_no_equal_tokens_the_table_says_why(
    synthetic, tmp_path: Path, tokens: int, validated: Sequence[int], said: str
) -> None:
    synthetic.make_run(tmp_path, "one")
    synthetic.make_run(tmp_path, "two", tokens=tokens, validated=validated)
    assert any(said in note for note in sheet(comparison.make([tmp_path]), "tokens").notes)


def test_cost_failures_and_settings_are_the_runs_own(three: Comparison) -> None:
    cost = cells(three, "cost", "nothing")
    assert (cost["updates"], cost["prompts"], cost["generated tokens"], cost["scored tokens"]) == (
        "8",
        "32",
        "1,600",
        "2,400",
    )
    assert cost["seconds, training"] == "16" and cost["seconds, whole run"] == "61 (60 to 62)"
    assert cells(three, "phases", "strong")["gen"] == "4"
    failed = cells(three, "failures", "strong")
    assert (failed["unparsed"], failed["truncated"], failed["judge failed"]) == ("0.0", "0.0", "no judge")
    settings = cells(three, "settings", "harmful")
    assert settings["anchor (teacher, KL)"] == "anchor of harmful" and settings["learning rate"] == "3e-05"


def test_seconds_of_different_machines_are_said_not_to_compare(
    three: Comparison, synthetic, tmp_path: Path
) -> None:
    assert any("Abacus, 2 cores, and depend" in note for note in sheet(three, "cost").notes)
    synthetic.make_run(tmp_path, "one")
    synthetic.make_run(tmp_path, "two", machine="Slide rule, 1 cores")
    note = sheet(comparison.make([tmp_path]), "cost").notes[-1]
    assert note.endswith("not comparable: Abacus, 2 cores; Slide rule, 1 cores.")


def test_collapse_is_named(synthetic, tmp_path: Path) -> None:
    run = synthetic.make_run(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    summary["collapse"]["length"] = [4, 5]
    (run / "summary.json").write_text(json.dumps(summary))
    row = cells(comparison.make([tmp_path]), "failures", "alpha")
    assert row["collapse flags in training"] == "length: seed 0 from step 4 (2 steps)"


# ---- runs that are not comparable -----------------------------------------------------------------------------------

PARTS = {"rule": "strict", "judge": "none", "code": "9a65e4"}
DIFFERENT = {
    "the data": {"data_hash": "other"},
    "the base model": {"model_hash": "other"},
    "the budget (train.steps)": {"changed": {"train.steps": 9}},
    "the budget (train.prompts)": {"changed": {"train.prompts": 9}},
    "the budget (rollout.max_response_tokens)": {"changed": {"rollout.max_response_tokens": 9}},
    "the budget (rollout.chat_template)": {"changed": {"rollout.chat_template": {"enable_thinking": False}}},
    "the judge": {"scorer": PARTS | {"judge": "some model"}},
    "the scorer": {"scorer": PARTS | {"rule": "official"}},
    "the parser's code": {"scorer": PARTS | {"code": "other"}},
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_the_first_difference_and_both_runs_are_named(synthetic, tmp_path: Path, what: str) -> None:
    one = synthetic.make_run(tmp_path, "one")
    two = synthetic.make_run(tmp_path, "two", **DIFFERENT[what])
    with pytest.raises(UserError) as caught:
        comparison.make([one, two])
    assert f"{one} and {two} differ in {what} (" in str(caught.value)
    c = comparison.make([one, two], mixed=True)
    assert any(what in note and "NOT COMPARABLE" in note for note in sheet(c, "accuracy-methods").notes)


def test_other_questions_do_not_compare_and_mixed_uses_the_common_ones(synthetic, tmp_path: Path) -> None:
    one = synthetic.make_run(tmp_path, "one", fixed=0.5)
    two = synthetic.make_run(tmp_path, "two", asked=synthetic.questions({"test": 120, "holdout": 60}))
    with pytest.raises(
        UserError, match=r"questions answered before training \(380 answers and 300 answers\)"
    ):
        comparison.make([one, two])
    c = comparison.make([one, two], mixed=True)
    assert c.rows["two"].against is not None


def test_runs_of_a_recipe_with_other_settings_are_no_seeds_of_one_another(synthetic, tmp_path: Path) -> None:
    runs = [
        synthetic.make_run(tmp_path, "one", 0),
        synthetic.make_run(tmp_path, "one", 1, changed={"train.lr": 1e-3, "hardware": {"memory_gib": 3}}),
    ]
    with pytest.raises(UserError, match=r"the setting train\.lr of one \(3e-05 and 0\.001\)"):
        comparison.make(runs)
    assert set(comparison.make(runs, mixed=True).rows) == {"one (train.lr=3e-05)", "one (train.lr=0.001)"}


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ({"fingerprint": {"code vopd/views.py": "1", "recipe module m.py": "a", "data": "x"}},
         {"fingerprint": {"code vopd/views.py": "1", "recipe module m.py": "b", "data": "y"}}, "recipe module m.py"),
        ({"fingerprint": {"code vopd/views.py": "1"}}, {"fingerprint": {"code vopd/views.py": "2"}},
         "code vopd/views.py"),
        ({"fingerprint": {"code vopd/views.py": "1"}}, {}, "code"),
        ({}, {"code_hash": "other"}, "code"),
    ],
)  # fmt: skip
def test_runs_of_other_code_are_no_seeds_of_one_another(
    synthetic, tmp_path: Path, first: dict, second: dict, what: str
) -> None:
    runs = [synthetic.make_run(tmp_path, "one", seed, **facts) for seed, facts in enumerate((first, second))]
    with pytest.raises(UserError, match=rf"differ in the {what} of one \("):
        comparison.make(runs)
    rows = comparison.make(runs, mixed=True).rows
    assert len(rows) == 2 and all("one (code=" in name for name in rows)


def test_seeds_of_one_code_are_one_row(synthetic, tmp_path: Path) -> None:
    for seed, data in enumerate(("x", "y")):  # the data is compared by its own hash
        parts = {"code vopd/views.py": "1", "recipe module m.py": "a", "data": data}
        synthetic.make_run(tmp_path, "one", seed, fingerprint=parts)
    assert set(comparison.make([tmp_path]).rows) == {"one"}


def test_a_method_may_differ_in_its_own_settings(synthetic, tmp_path: Path) -> None:
    synthetic.make_run(tmp_path, "one")
    synthetic.make_run(
        tmp_path, "two", changed={"method.top_k": 5, "train.lr": 1e-3, "rollout.train_share": 0.5}
    )
    assert comparison.make([tmp_path]).mixed == []


def test_the_same_run_twice_is_an_error_even_if_mixed(synthetic, tmp_path: Path) -> None:
    runs = [synthetic.make_run(tmp_path / place) for place in ("a", "b")]
    with pytest.raises(UserError, match="are both alpha, seed 0"):
        comparison.make(runs, mixed=True)
    assert len(comparison.make([runs[0], runs[0]]).runs) == 1


# ---- broken runs ---------------------------------------------------------------------------------------------------


def no_summary(run: Path) -> None:
    (run / "summary.json").unlink()


def old_summary(run: Path) -> None:
    (run / "summary.json").write_text('{"run": {"recipe": "x"}}')


def torn_summary(run: Path) -> None:
    (run / "summary.json").write_bytes((run / "summary.json").read_bytes()[:300])


def torn_records(run: Path) -> None:
    file = run / "records" / "after.jsonl"
    file.write_bytes(file.read_bytes()[:-20])


def no_records(run: Path) -> None:
    (run / "records" / "before.jsonl").unlink()


def broken_line(run: Path) -> None:
    file = run / "records" / "after.jsonl"
    file.write_text("{]\n" + file.read_text())


def no_metrics(run: Path) -> None:
    (run / "metrics.jsonl").unlink()


@pytest.mark.parametrize(
    "harm", [no_summary, old_summary, torn_summary, torn_records, no_records, broken_line, no_metrics]
)
def test_a_broken_run_is_named_and_the_table_made_from_the_rest(
    synthetic, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    synthetic.make_run(tmp_path, "whole", fixed=0.3)
    broken = synthetic.make_run(tmp_path, "broken")
    harm(broken)
    c = comparison.make([tmp_path])
    assert list(c.rows) == ["whole"]
    assert [b.folder for b in c.broken] == [broken]
    assert any(str(broken) in note for note in sheet(c, "accuracy-methods").notes)


def test_nothing_usable_is_an_error(synthetic, tmp_path: Path) -> None:
    run = synthetic.make_run(tmp_path)
    no_summary(run)
    with pytest.raises(UserError, match=r"None of the 1 runs can be used.*no summary\.json"):
        comparison.make([run])
    with pytest.raises(UserError, match="There is no folder"):
        comparison.make([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        comparison.make([tmp_path / "empty"])


def test_runs_that_were_replaced_are_not_looked_at(synthetic, tmp_path: Path) -> None:
    synthetic.make_run(tmp_path, "one")
    synthetic.make_run(tmp_path / "one" / "replaced", "one")
    assert len(comparison.make([tmp_path]).runs) == 1


def test_difference_of_one_seed_is_mcnemars(synthetic, tmp_path: Path) -> None:
    synthetic.make_run(tmp_path, "one", fixed=0.5)
    synthetic.make_run(tmp_path, "two", fixed=0.2, broken=0.1)
    c = comparison.make([tmp_path])
    one, two = (
        {r.id: r.correct for r in run.after if (r.split, r.view) == ("test", "full")} for run in c.runs
    )
    against = c.rows["two"].against
    assert against and against.difference == statistics.paired_difference(one, two)


def test_markdown_escapes_what_would_break_the_table() -> None:
    odd = Sheet("k", "a <b>", ["x", "y"], [["p|q", "<script>"], ["`z`", "a\nb"]], ["*n*"])
    lines = to_markdown(odd).splitlines()
    assert lines[0] == "## a &lt;b>"
    assert lines[4:6] == ["| p\\|q | &lt;script> |", "| \\`z\\` | a b |"]
    assert all(len(line.replace("\\|", "").split("|")) == 4 for line in lines[2:6])


def test_generator_of_the_fixture_depends_on_its_parts_alone(synthetic) -> None:
    random.seed(1)
    first = synthetic.chance("a", 1).random()
    random.seed(2)
    assert synthetic.chance("a", 1).random() == first != synthetic.chance("a", 2).random()
