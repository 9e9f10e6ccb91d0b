"""summary.json and the printed table of one model: figures per benchmark, view and variant, with their failures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from vopd.common.chat_client import one_line
from vopd.errors import UserError
from vopd.evaluation import metrics, statistics
from vopd.evaluation.benchmark import Questions
from vopd.evaluation.description import Benchmark
from vopd.evaluation.judge import Replies
from vopd.evaluation.records import Record, RecordFile, answers, select

FULL, CLEAN = "full", "de-overlapped"


def read_exclusions(files: Sequence[Path], sets: Sequence[Questions]) -> dict[str, dict[str, Any]]:
    """Exclusion lists by benchmark, as `vopd data audit` writes them.

    Raises:
        UserError: no such file, not such a list, for a benchmark that is not evaluated, or naming unknown ids.
    """
    known = {questions.name: {q.id for q in questions.questions} for questions in sets}
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file}: not a readable JSON file.") from error
        if not isinstance(content, dict) or {"benchmark", "train", "excluded", "method"} - set(content):
            raise UserError(
                f"{file}: an object with the keys benchmark, train, excluded and method is expected."
            )
        name, ids = content["benchmark"], content["excluded"]
        if not isinstance(ids, list) or not all(isinstance(i, (str, int)) for i in ids):
            raise UserError(f"{file}: excluded is not a list of question ids.")
        excluded = [str(i) for i in ids]
        if not isinstance(name, str) or name not in known:
            raise UserError(
                f"{file}: is for benchmark '{name}', which is not evaluated; drop it or add the benchmark."
            )
        strange = sorted(set(excluded) - known[name])
        if strange:
            raise UserError(
                f"{file}: question '{strange[0]}' is not in {name}; make the list from the same files."
            )
        found[name] = content | {"excluded": excluded}
    return found


def summarise(
    questions: Questions,
    file: RecordFile,
    scorer: str,
    judge: str | None,
    replies: Replies,
    exclusion: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All figures of one benchmark. variants -> views -> figures; the gap where both views are answered.

    judge: the name of the model whose replies these are; None without a judge.
    """
    scored = metrics.score(file.records, questions.spec, scorer, replies)
    result: dict[str, Any] = {
        "benchmark": questions.name,
        "title": questions.spec.title,
        "scorer": _named(scorer, judge),
        "judge": judge,
        "official_rule": questions.spec.official_rule,
        "rows_published": questions.spec.rows,
        "rows_found": len(questions.questions),
        "torn_lines": file.torn,
        "judge_failed": scored.failed,
        "concurrency": sorted({r.details["concurrency"] for r in file.records}),
        "variants": {},
    }
    if scorer == "official":
        result["side by side"] = {
            view: _both_scorers(asked, questions.spec, replies)
            for view in questions.views
            if (asked := select(file.records, view=view))
        }
    kept = {FULL: scored.records}
    if exclusion is not None:
        excluded = set(exclusion["excluded"])
        kept[CLEAN] = [r for r in scored.records if r.id not in excluded]
        result["exclusion"] = {
            "train": exclusion["train"],
            "method": exclusion["method"],
            "questions": len(excluded),
        }
    for variant, records in kept.items():
        views = {view: select(records, view=view) for view in questions.views}
        part: dict[str, Any] = {v: metrics.figures(r, questions.spec) for v, r in views.items() if r}
        both = [answers(views.get(view, [])) for view in ("full", "crop")]
        shared = sorted(set(both[0]) & set(both[1]))
        if len(shared) > 1:
            full, crop = ({i: side[i] for i in shared} for side in both)
            part["gap"] = dataclasses.asdict(statistics.gap(full, crop, metrics.clusters(views["full"])))
        result["variants"][variant] = part
    return result


def _named(scorer: str, judge: str | None) -> str:
    """A scorer with what stands behind it: to the official one a judge belongs, and its absence is said."""
    if judge is not None:
        return f"{scorer}, judge {judge}"
    return f"{scorer}, rules only" if scorer == "official" else scorer


def _both_scorers(records: Sequence[Record], spec: Benchmark, replies: Replies) -> dict[str, Any]:
    """Scorer -> accuracies by its rules alone and with the judge, responses open to one, and what it did."""
    found = {}
    for scorer in metrics.SCORERS:
        rules, judged = (metrics.score(records, spec, scorer, said) for said in ({}, replies))
        found[scorer] = {
            "questions": len(records),
            "rules": _share_right(rules.records),
            "judged": _share_right(judged.records),
            "open": judged.open,
            "turned": judged.turned,
            "failed": judged.failed,
        }
    return found


def _share_right(records: Sequence[Record]) -> float | None:
    return sum(r.correct for r in records) / len(records) if records else None


def side_by_side(summaries: Sequence[Mapping[str, Any]]) -> Table:
    """The printed table of both scorers, from summaries of the official one; shares in per cent of the questions."""
    shown = Table(
        title="strict and official, in per cent of the questions; turned: wrong by the rules, right to the judge",
        title_justify="left",
    )
    for text in ("benchmark", "view"):
        shown.add_column(text)
    shown.add_column("questions", justify="right")
    for scorer in metrics.SCORERS:
        for column in ("rules", "with judge", "turned", "no verdict"):
            shown.add_column(f"{scorer}: {column}", justify="right")
    for result in summaries:
        for view, scorers in result["side by side"].items():
            cells = [cell for scorer in metrics.SCORERS for cell in _side(result, scorers[scorer])]
            shown.add_row(plain(result["title"]), view, str(scorers["strict"]["questions"]), *cells)
    return shown


def _side(result: Mapping[str, Any], part: Mapping[str, Any]) -> list[str]:
    rules = f"{100 * part['rules']:.1f}"
    if not result["judge"]:
        return [rules, "no judge", f"{part['open']} open", "-"]
    judged = "-" if part["judged"] is None else f"{100 * part['judged']:.1f}"
    turned = f"{100 * part['turned'] / part['questions']:.1f} ({part['turned']} of {part['open']})"
    return [rules, judged, turned, str(part["failed"])]


def percent(interval: Mapping[str, float] | None) -> str:
    """An interval in per cent: "66.9 [64.0, 69.7]"."""
    if interval is None:
        return "-"
    return "{value:.1f} [{low:.1f}, {high:.1f}]".format(
        **{k: 100 * interval[k] for k in ("value", "low", "high")}
    )


def table(summaries: Sequence[Mapping[str, Any]], model: str) -> Table:
    """The printed table; accuracies in per cent with 95% intervals."""
    shown = Table(title=f"{plain(model)}: accuracy in per cent with 95% intervals", title_justify="left")
    texts = ("benchmark", "view", "variant")
    numbers = (
        "questions",
        "accuracy",
        "official",
        "unparsed",
        "truncated",
        "judge failed",
        "tokens",
        "resized",
    )
    for column in (*texts, *numbers, "scorer"):
        shown.add_column(column, justify="right" if column in numbers else "left")
    for result in summaries:
        for variant, views in result["variants"].items():
            for view, part in views.items():
                shown.add_row(
                    plain(result["title"]),
                    view,
                    variant,
                    *_cells(result, view, part),
                    plain(result["scorer"]),
                )
    return shown


def plain(text: str) -> str:
    """Text from a file or the user for a table of the terminal, which takes no markup: one line of it."""
    return one_line(text)


def _cells(result: Mapping[str, Any], view: str, part: Mapping[str, Any]) -> list[str]:
    if view == "gap":
        return ["", percent(part), *[""] * 6]
    whole = result["rows_published"]
    count = f"{part['questions']}" if part["questions"] == whole else f"{part['questions']} of {whole}"
    resized = "?" if part["resized"] is None else f"{100 * part['resized']:.0f}%"
    return [
        count,
        percent(part["accuracy"]),
        _official(part),
        f"{100 * part['unparsed']:.1f}%",
        f"{100 * part['truncated']:.1f}%",
        str(result["judge_failed"]),
        _tokens(part),
        resized,
    ]


def _official(part: Mapping[str, Any]) -> str:
    """What a benchmark's own rule reports, and below it what another one makes of the same answers."""
    if "yes/no" in part and part["yes/no"]["f1"] is not None:
        return f"F1 {100 * part['yes/no']['f1']:.1f}, yes {100 * part['yes/no']['yes_ratio']:.1f}"
    lines = [percent(part.get("pair accuracy") or part.get("official mean"))]
    if part.get("paper mean"):
        lines.append(f"paper's mean {100 * part['paper mean']['value']:.1f}")
    if corrected := part.get("accuracy, corrected golds"):
        pairs = part.get("pair accuracy, corrected golds")
        lines.append(f"corrected {100 * corrected['value']:.1f}")
        lines[-1] += f", pairs {100 * pairs['value']:.1f}" if pairs else ""
    return "\n".join(lines)


def _tokens(part: Mapping[str, Any]) -> str:
    return "?" if part["response_tokens"] is None else f"{part['response_tokens']:.1f}"


def speed(result: Mapping[str, Any]) -> str:
    """The paper's Figure 6 (appendix A): the inverse of the mean inference time of a question, full view."""
    part = result["variants"][FULL].get("full")
    title = plain(result["title"])
    if part is None or not part["seconds"]:
        return f"{title}: no times recorded"
    at_once = ", ".join(map(str, result["concurrency"]))
    return (
        f"{title}: {1 / part['seconds']:.3f} questions/s = 1 / mean seconds per question "
        f"({part['seconds']:.3f} s, {_tokens(part)} tokens), {at_once} at once"
    )
