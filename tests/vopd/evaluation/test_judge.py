"""The judge of both scorers against stub servers: who asks what, what counts, what is shared, what is asked again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vopd.common import control_tokens
from vopd.evaluation import benchmark, evaluate, judge, metrics, model_comparison
from vopd.evaluation.records import Record

Start = Callable[..., Any]


def says(replies: dict[str, Any], otherwise: Any = "no") -> Callable[[dict[str, Any]], Any]:
    """A server that replies to a message by a text that is in it; an int is an HTTP status."""

    def answer(body: dict[str, Any]) -> Any:
        content = body["messages"][0]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        reply = next((reply for part, reply in replies.items() if part in text), otherwise)
        return reply if isinstance(reply, int) else {"text": reply}

    return answer


class Run:
    """An evaluation of one benchmark by a stub model and a stub judge."""

    def __init__(self, stub: Start, published: Path, out: Path, name: str, model: Any, judge: Any) -> None:
        self.model, self.judge, self.folder = stub(model), stub(judge), out / "stub" / name
        self.arguments = [
            "model=stub", f"benchmarks=[{name}]", f"endpoint={self.model.url}", f"data={published}", f"out={out}",
            "views=[full]",
        ]  # fmt: skip

    def __call__(self, scorer: str, judged: bool = True, name: str = "j") -> int:
        more = [f"judge.endpoint={self.judge.url}", f"judge.model={name}"] if judged else []
        return evaluate.main([*self.arguments, f"scorer={scorer}", *more])

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def accuracy(self) -> float:
        return self.summary["variants"]["full"]["full"]["accuracy"]["value"]


def test_wrong_letters_go_to_the_official_judge_and_both_scorers_are_shown(
    stub: Start, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Golds A, B, C and always "Answer: C": the published rule reads the A of "Answer"."""
    run = Run(
        stub, published, tmp_path, "vstar", says({}, "Answer: C"), says({"Reference answer: C": " Yes\n"})
    )
    assert run("official") == 0
    assert len(run.judge.asked) == 2 and run.accuracy == pytest.approx(2 / 3)
    assert run.summary["scorer"] == "official, judge j"
    sides = run.summary["side by side"]["full"]
    assert sides["strict"] == {
        "questions": 3, "rules": pytest.approx(1 / 3), "judged": pytest.approx(1 / 3), "open": 0, "turned": 0,
        "failed": 0,
    }  # fmt: skip
    assert sides["official"] == {
        "questions": 3, "rules": pytest.approx(1 / 3), "judged": pytest.approx(2 / 3), "open": 2, "turned": 1,
        "failed": 0,
    }  # fmt: skip
    shown = " ".join(capsys.readouterr().out.split())
    assert "33.3 (1 of 2)" in shown and "66.7" in shown
    assert run("official") == 0 and run("strict") == 0
    assert len(run.judge.asked) == 2 and len(run.model.asked) == 3
    assert run.accuracy == pytest.approx(1 / 3) and "side by side" not in run.summary


def test_only_an_exact_yes_counts(stub: Start, published: Path, tmp_path: Path) -> None:
    replies = {"answer: B": "Yes.", "answer: C": "yes, it does"}
    run = Run(stub, published, tmp_path, "vstar", says({}, "I cannot tell"), says(replies, "YES"))
    assert run("official") == 0
    assert run.accuracy == pytest.approx(1 / 3) and run.summary["judge_failed"] == 0
    assert run("strict") == 0  # which reads all three of the same replies
    assert run.accuracy == 1.0 and len(run.judge.asked) == 3


def test_a_failed_call_is_a_no_to_the_official_scorer_and_a_third_state_to_the_strict_one(
    stub: Start, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replies: dict[str, Any] = {"answer: B": 400}
    run = Run(stub, published, tmp_path, "vstar", says({}, "I cannot tell"), says(replies, "yes"))
    assert run("official") == 1
    assert "1 responses got no verdict and count as wrong" in " ".join(capsys.readouterr().out.split())
    part = run.summary["variants"]["full"]["full"]
    assert (run.accuracy, part["questions"], run.summary["judge_failed"]) == (pytest.approx(2 / 3), 3, 1)
    sides = run.summary["side by side"]["full"]
    assert (sides["strict"]["judged"], sides["strict"]["failed"]) == (1.0, 1)
    assert (sides["official"]["judged"], sides["official"]["failed"]) == (pytest.approx(2 / 3), 1)
    asked = len(run.judge.asked)
    assert run("strict") == 1
    assert len(run.judge.asked) == asked + 1  # the failed one alone
    assert run.summary["variants"]["full"]["full"]["questions"] == 2
    replies.clear()
    assert run("official") == 0 and run.accuracy == 1.0
    assert len(run.judge.asked) == asked + 2


def test_zoombench_goes_number_rule_then_judge(stub: Start, published: Path, tmp_path: Path) -> None:
    """It is not among the letter benchmarks: "(B) blue" is read by the judge alone, "B" is the gold as a whole."""
    said = {"colour": "(B) blue", "birds": "7.", "say": "exit only"}
    run = Run(stub, published, tmp_path, "zoombench", says(said), says({"answer: B": "Yes"}))
    assert run("official") == 0
    (asked,) = run.judge.asked
    assert "Response: (B) blue" in asked["messages"][0]["content"]
    assert run.accuracy == 1.0 and run.summary["side by side"]["full"]["official"]["rules"] == pytest.approx(
        2 / 3
    )


def test_the_scorers_share_what_they_ask_alike(stub: Start, published: Path, tmp_path: Path) -> None:
    """Both ask of the text that differs; the official one of what it cuts out of the others, too."""
    said = {"colour": "Answer: C", "birds": "5 or 7", "say": "The way out only"}
    run = Run(stub, published, tmp_path, "zoombench", says(said), says({}, "no"))
    assert run("strict") == 0 and len(run.judge.asked) == 2
    assert run("official") == 0 and len(run.judge.asked) == 3
    assert run("official") == 0 and run("strict") == 0 and len(run.judge.asked) == 3
    assert run("official", name="another") == 0 and len(run.judge.asked) == 6


def test_without_a_judge_the_official_scorer_is_its_rules_and_says_so(
    stub: Start, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(stub, published, tmp_path, "vstar", says({}, "(B)"), says({}, "yes"))
    assert run("official", judged=False) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "rules only" in shown and "no judge" in shown and "2 open" in shown
    assert run.judge.asked == [] and run.accuracy == pytest.approx(1 / 3)
    assert run("official") == 0 and run.accuracy == 1.0  # with one, and without the model
    assert len(run.model.asked) == 3


def test_a_comparison_takes_the_official_judge_where_it_was_asked_all(
    stub: Start, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(stub, published, tmp_path, "vstar", says({}, "Answer: C"), says({"answer: C": "yes"}))
    assert run("strict") == 0
    folder = str(tmp_path / "stub")
    both = [folder, folder, "scorer=official"]
    assert model_comparison.main([*both, "judge=true"]) == 2
    assert "the judge has not seen 2 of 2 responses" in capsys.readouterr().err
    assert model_comparison.main(both) == 0
    assert "scorer official, rules only" in capsys.readouterr().out
    assert run("official") == 0
    capsys.readouterr()
    assert model_comparison.main([*both, "judge=true"]) == 0
    assert "66.7" in capsys.readouterr().out


def record(response: str, gold: str, kind: str) -> Record:
    details = {"answer_type": kind, "options": [], "groups": {"category": "popular"}, "cluster": None}
    return Record("q", "f", "full", "s", "Which?", response, 1, False, None, gold, False, details)


@pytest.mark.parametrize(
    ("response", "gold", "kind", "strict", "official"),
    [
        ("B", "B", "letter", None, None),
        ("C", "B", "letter", None, "C"),
        ("Answer: B", "B", "letter", None, "Answer: B"),
        ("So <answer>B or C</answer>", "A", "letter", "So <answer>B or C</answer>", "B or C"),
        ("", "B", "letter", None, ""),
        ("Yes", "no", "yes/no", None, "Yes"),
        ("Answer: yes", "yes", "yes/no", None, "Answer: yes"),
        ("a cat", "a dog", "short", "a cat", "a cat"),
    ],
)
def test_what_each_scorer_asks(
    response: str, gold: str, kind: str, strict: str | None, official: str | None
) -> None:
    spec = benchmark.find("pope")[1]
    for scorer, wanted in (("strict", strict), ("official", official)):
        (read,) = metrics.parsed([record(response, gold, kind)], spec, scorer)
        ask = judge.ask_of(read, scorer)
        assert (ask.response if ask else None) == wanted


def test_popes_published_figure_takes_what_the_judge_turned() -> None:
    spec = benchmark.find("pope")[1]
    records = [record(r, g, "yes/no") for r, g in [("Yes", "yes"), ("Perhaps", "no"), ("Perhaps", "yes")]]
    alone = metrics.yes_no(metrics.score(records, spec, "official", {}).records)
    assert alone["official_f1"] == pytest.approx(1 / 2) and alone["accuracy"] == pytest.approx(1 / 3)
    asks = [judge.ask_of(read, "official") for read in metrics.parsed(records, spec, "official")]
    replies = {ask.key: "yes" if ask.gold == "yes" else "no" for ask in asks if ask}
    turned = metrics.yes_no(metrics.score(records, spec, "official", replies).records)
    assert turned["official_f1"] == pytest.approx(4 / 5) and turned["accuracy"] == pytest.approx(2 / 3)


@given(text=st.text() | st.sampled_from(["<|im_end|>", "</think>", "<image>"]).map("a {} b".format))
def test_a_response_that_goes_to_the_judge_holds_no_control_token(text: str) -> None:
    message = judge.Ask("id", "full", text, text, text).message
    assert not control_tokens.pattern().search(message)


def test_another_prompt_is_another_question(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = judge.Ask("id", "full", "Which?", "B", "C")
    before = ask.key
    assert judge.Ask("other", "crop", "Which?", "B", "C").key == before
    monkeypatch.setattr(judge, "_QUESTION", judge._QUESTION + "!")
    assert ask.key != before
