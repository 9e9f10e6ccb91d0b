"""Several seeds of one recipe in one table: `python -m vopd.report.seeds RUN_DIR...`.

Each run folder is one training seed. Intervals resample seeds and questions (crossed); changes are paired by
question within each seed. With two or three seeds the seeds' share of an interval is rough: the number of seeds
stands in the title.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vopd.errors import UserError
from vopd.evaluation import statistics
from vopd.evaluation.records import answers, read_records, select
from vopd.report.summary import HOLD_OUT, TEST, Row, accuracy_table, percent, to_text

Answers = dict[int, dict[str, float]]


def _read(run_dirs: Sequence[Path], when: str, view: str, split: str) -> Answers:
    """Run -> question id -> right (1.0) or wrong (0.0)."""
    found: Answers = {}
    for number, run_dir in enumerate(run_dirs):
        path = run_dir / "records" / f"{when}.jsonl"
        chosen = answers(select(read_records(path).records, view=view, split=split))
        if not chosen:
            raise UserError(f"{path} has no answers to split '{split}' in view '{view}'.")
        found[number] = {i: float(right) for i, right in chosen.items()}
    return found


def _holds_out(run_dir: Path) -> bool:
    """Whether the run's data had a hold-out split."""
    return bool(select(read_records(run_dir / "records" / "before.jsonl").records, split=HOLD_OUT))


def _minus(first: Answers, second: Answers, names: tuple[str, str]) -> Answers:
    """first - second, run by run and question by question; names are theirs, for the message if they differ."""
    return {
        run: statistics.answer_differences(
            second[run], values, (f"{names[1]}, run {run + 1}", f"{names[0]}, run {run + 1}")
        )
        for run, values in first.items()
    }


def summarise_seeds(run_dirs: Sequence[Path]) -> tuple[list[Row], statistics.Interval | None]:
    """The table's rows over all runs, and the share of the gap that was closed.

    UserError for missing files and for runs that were evaluated on different questions.
    """
    parts = [("full", "full", TEST), ("crop", "crop", TEST)]
    if any(_holds_out(run_dir) for run_dir in run_dirs):
        parts.append(("hold-out", "full", HOLD_OUT))
    sides = {
        name: (_read(run_dirs, "before", view, split), _read(run_dirs, "after", view, split))
        for name, view, split in parts
    }
    gap = tuple(
        _minus(crop, full, ("crop", "full")) for crop, full in zip(sides["crop"], sides["full"], strict=True)
    )
    names = ("full", "crop", "gap", "hold-out")
    ordered = {name: pair for name in names if (pair := {**sides, "gap": gap}.get(name))}
    changes = {
        name: statistics.two_level(_minus(pair[1], pair[0], ("after", "before")))
        for name, pair in ordered.items()
    }
    corrected = statistics.holm({name: change.p_value for name, change in changes.items()})
    rows = [
        Row(
            name=name,
            questions=len(pair[0][0]),
            before=statistics.two_level(pair[0]),
            after=statistics.two_level(pair[1]),
            change=changes[name],
            p_holm=corrected[name],
        )
        for name, pair in ordered.items()
    ]
    full_before, full_after = sides["full"]
    return rows, statistics.two_level_ratio(_minus(full_after, full_before, ("after", "before")), gap[0])


def render_seeds(run_dirs: Sequence[Path]) -> str:
    """The table over seeds, then each seed's own full-view change."""
    rows, closed = summarise_seeds(run_dirs)
    before, after = (_read(run_dirs, when, "full", TEST) for when in ("before", "after"))
    lines = [
        f"gap closed  {'no gap to close' if closed is None else percent(closed) + ' %'}",
        "full, each run:",
    ]
    for number, run_dir in enumerate(run_dirs):
        means = [100 * sum(side[number].values()) / len(side[number]) for side in (before, after)]
        lines.append(f"  {means[0]:5.1f} -> {means[1]:5.1f}  {run_dir}")
    title = f"{len(run_dirs)} seeds, before and after training (95% intervals over seeds and questions)"
    return to_text(accuracy_table(rows, title), *lines)


def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 2 on bad input."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m vopd.report.seeds RUN_DIR...   (one folder a seed)")
        return 0 if arguments else 2
    try:
        print(render_seeds([Path(a) for a in arguments]))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
