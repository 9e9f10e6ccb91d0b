"""Official metrics on hand-made records, and the comparison of two models."""

import dataclasses
import math
from pathlib import Path

import pytest

from vopd.errors import UserError
from vopd.evaluation import benchmark, metrics, model_comparison, statistics
from vopd.evaluation.records import Record, write_records


def record(
    i: str, response: str, gold: str, kind: str = "letter", cluster: str | None = None, **groups: str
) -> Record:
    details = {
        "answer_type": kind, "options": [], "groups": groups, "cluster": cluster, "seconds": 1.0, "concurrency": 1,
        "image_in": [8, 8], "image_out": [8, 8] if i != "small" else [16, 16],
    }  # fmt: skip
    return Record(i, "f", "full", "s", "p", response, 1, False, None, gold, False, details)


def figures(name: str, records: list[Record], scorer: str = "strict") -> dict:
    spec = benchmark.find(name)[1]
    return metrics.figures(metrics.score(records, spec, scorer, {}).records, spec)


def test_pope_figures_come_from_predictions_and_unparsed_is_neither() -> None:
    says = [("Yes", "yes"), ("Yes.", "no"), ("no", "yes"), ("No", "no"), ("Perhaps", "yes"), ("yes", "yes")]
    records = [
        record(str(i), r, g, "yes/no", str(i // 2), category="popular") for i, (r, g) in enumerate(says)
    ]
    result = figures("pope", records)
    expected = {"accuracy": 3 / 6, "precision": 2 / 3, "recall": 2 / 4, "f1": 4 / 7, "yes_ratio": 3 / 6}
    expected |= {"official_f1": 4 / 7, "official_yes_ratio": 4 / 6}
    assert result["yes/no"] == pytest.approx(expected)
    assert result["yes/no, popular"] == result["yes/no"]
    assert result["unparsed"] == pytest.approx(1 / 6)
    # The paper's evaluation takes what is unparsed for a "yes" where the gold is "no".
    more = figures("pope", [*records, record("6", "Perhaps", "no", "yes/no", "3", category="popular")])
    assert (more["yes/no"]["f1"], more["yes/no"]["official_f1"]) == pytest.approx((4 / 7, 4 / 8))
    nothing = metrics.yes_no([record("1", "No", "no", "yes/no")])
    assert (nothing["precision"], nothing["recall"], nothing["f1"]) == (None, None, None)


def test_mmvp_counts_pairs_with_both_right_and_drops_a_pair_without_its_mate() -> None:
    said = ["(a)", "(b)", "(a)", "(a)", "(a)"]
    records = [
        record(str(i), s, "(a)" if i % 2 == 0 else "(b)", cluster=str(i // 2)) for i, s in enumerate(said)
    ]
    result = figures("mmvp", records)
    assert result["accuracy"]["value"] == pytest.approx(4 / 5)
    assert result["pair accuracy"]["value"] == 0.5


def test_the_official_rule_of_mmvp_takes_the_article_for_an_option() -> None:
    (scored,) = metrics.score(
        [record("1", "It is a closed door", "(a)")], benchmark.find("mmvp")[1], "official", {}
    ).records
    assert scored.correct
    (strict,) = metrics.score(
        [record("1", "It is a closed door", "(a)")], benchmark.find("mmvp")[1], "strict", {}
    ).records
    assert strict.parsed is None


def test_cv_bench_is_the_mean_of_2d_and_3d() -> None:
    records = [
        record(f"a{i}", "A" if i < 1 else "B", "A", type="2D", source="ADE20K", task="Count")
        for i in range(4)
    ]
    records += [record(f"c{i}", "A", "A", type="2D", source="COCO", task="Count") for i in range(2)]
    records += [
        record(f"o{i}", "A" if i < 3 else "B", "A", type="3D", source="Omni3D", task="Depth")
        for i in range(6)
    ]
    result = figures("cv_bench", records)
    assert result["official mean"]["value"] == pytest.approx(((0.25 + 1.0) / 2 + 0.5) / 2)
    assert result["official mean"]["low"] < result["official mean"]["value"] < result["official mean"]["high"]
    assert result["by type"]["2D"]["value"] == pytest.approx(3 / 6)
    assert result["paper mean"]["value"] == pytest.approx(
        (3 / 6 + 3 / 6) / 2
    )  # 2D by questions, not by sources
    without = figures("cv_bench", records[:6])
    assert without["official mean"] is without["paper mean"] is None  # no 3D answers yet
    strange = dataclasses.replace(
        records[0], details=records[0].details | {"groups": {"type": "2D", "source": "X", "task": "t"}}
    )
    with pytest.raises(UserError, match="no weight for 'X'"):
        figures("cv_bench", [*records[1:], strange])


def test_hrbench_is_the_mean_over_cycles_and_categories_and_its_rows_are_no_independent_draws() -> None:
    kind = ("single", "cross")
    records = [
        record(f"{q}{c}", "AB"[q % 2], "A", cluster=str(q), category=kind[q % 3 == 0], cycle=str(c))
        for q in range(12)
        for c in range(4)
    ]
    result = figures("hrbench_4k", records)
    assert set(result["by cycle"]) == {"0", "1", "2", "3"}
    by_kind = [result["by category"][k]["value"] for k in kind]
    assert result["official mean"]["value"] == pytest.approx(sum(by_kind) / 2)
    wide = result["accuracy"]["high"] - result["accuracy"]["low"]
    naive = statistics.accuracy({r.id: r.response == "A" for r in records})
    assert wide > 1.5 * (naive.high - naive.low)


def test_resized_pictures_are_counted_and_unknown_stays_unknown() -> None:
    records = [record("small", "A", "A", category="x"), record("2", "A", "A", category="x")]
    assert figures("vstar", records)["resized"] == 0.5
    records[0].details["image_out"] = None
    assert figures("vstar", records)["resized"] is None


def test_weighted_accuracy_of_equal_strata_is_plain_accuracy() -> None:
    right = {str(i): i % 3 == 0 for i in range(30)}
    strata = {i: "ab"[int(i) % 2] for i in right}
    weighted = statistics.weighted_accuracy(right, strata, {"a": 0.5, "b": 0.5})
    assert weighted.value == pytest.approx(statistics.accuracy(right).value)
    assert weighted.low < weighted.value < weighted.high


# ---- two models ----------------------------------------------------------------------------------------------------


def run(folder: Path, right: int, name: str = "vstar", count: int = 40) -> Path:
    rows = [record(f"{i:02d}", "A" if i < right else "B", "A", category="x") for i in range(count)]
    write_records(folder / name / "records.jsonl", rows)
    return folder


def test_a_comparison_is_paired_corrected_and_states_what_it_could_have_seen(tmp_path: Path) -> None:
    first = run(run(tmp_path / "a", 20), 20, "mmstar")
    second = run(run(tmp_path / "b", 30), 21, "mmstar")
    rows = {row.name: row for row in model_comparison.compare([first], [second])}
    big, small = rows["vstar full"], rows["mmstar full"]
    assert (big.first, big.second, big.difference.value) == pytest.approx((0.5, 0.75, 0.25))
    assert big.difference.p_value == pytest.approx(2 * 0.5**10)  # exact McNemar: ten changes, all one way
    assert big.holm == pytest.approx(2 * big.difference.p_value)
    assert small.difference.p_value == small.holm == 1.0
    assert 0 < small.detectable < big.detectable
    assert not math.isnan(big.detectable)


def test_seeds_are_a_second_level(tmp_path: Path) -> None:
    first = [run(tmp_path / f"a{s}", 20) for s in range(3)]
    steady = [run(tmp_path / f"b{s}", 28) for s in range(3)]
    shaky = [run(tmp_path / f"c{s}", right) for s, right in enumerate((20, 28, 36))]
    one = model_comparison.compare(first, steady)[0].difference
    other = model_comparison.compare(first, shaky)[0].difference
    assert one.value == pytest.approx(other.value) == pytest.approx(0.2)
    assert other.high - other.low > 1.2 * (one.high - one.low)


def test_mmvp_is_compared_by_pairs_too(tmp_path: Path) -> None:
    for name, said in (("a", "(a)"), ("b", None)):
        rows = [
            record(
                str(i),
                said or ("(a)" if i % 2 == 0 else "(b)"),
                "(a)" if i % 2 == 0 else "(b)",
                cluster=str(i // 2),
            )
            for i in range(20)
        ]
        write_records(tmp_path / name / "mmvp" / "records.jsonl", rows)
    rows = {row.name: row for row in model_comparison.compare([tmp_path / "a"], [tmp_path / "b"])}
    assert rows["mmvp full"].difference.value == 0.5
    assert (rows["mmvp full pairs"].first, rows["mmvp full pairs"].second) == (0.0, 1.0)


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, fewer, other = (
        run(tmp_path / "a", 5),
        run(tmp_path / "b", 5, count=39),
        run(tmp_path / "c", 5, "mmstar"),
    )
    for second, sentence in [
        (fewer, "did not answer the same questions"),
        (other, "no benchmark and view in common"),
    ]:
        assert model_comparison.main([str(first), str(second)]) == 2
        assert sentence in capsys.readouterr().err
    assert model_comparison.main([str(first), f"{first},{fewer}"]) == 2
    assert model_comparison.main([str(first), str(tmp_path / "none")]) == 2
    assert model_comparison.main([str(first), str(first), "scorer=kind"]) == 2
    capsys.readouterr()
    assert model_comparison.main([str(first), str(first), "scorer=official"]) == 0
    assert "scorer official" in capsys.readouterr().out
