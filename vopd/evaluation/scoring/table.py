"""Both scoring rules on a file of crafted responses: `python -m vopd.evaluation.scoring.table FILE.jsonl`.

Each row of the file holds answer_type, options, response and the expected parse (null: nothing is stated). "missed"
counts stated answers left unparsed, "misread" another answer than the stated one, or one where none is stated. Rules
alone: what is missed or misread is what the judge of `scorer=official` may turn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vopd.common.command import reports_errors
from vopd.errors import UserError
from vopd.evaluation.scoring import ANSWER_TYPES, Parsed, is_correct, parse_answer
from vopd.evaluation.scoring.official import TEXTS, is_right, parse_official

RULES = ("strict", "official")


def outcome(row: Mapping[str, Any], rule: str) -> str:
    """ "as expected", "missed" or "misread"."""
    kind, options, expected = row["answer_type"], row["options"], row["expected"]
    if rule == "strict":
        parsed: Parsed = parse_answer(row["response"], kind, options)
        same = expected is not None and is_correct(parsed, expected, kind)
    else:
        lowercase = bool(options) and options[0].startswith("(a)")
        parsed = parse_official(row["response"], kind, options, lowercase_options=lowercase)
        same = expected is not None and is_right(parsed, row["response"], expected, kind)
    # The official rules read no answer out of a text: it is the gold as a whole, or the judge's.
    unread = parsed.value is None or (rule == "official" and kind in TEXTS)
    if unread and not same:
        return "as expected" if expected is None else "missed"
    return "as expected" if same else "misread"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A markdown table by answer type, and all together."""
    lines = [
        "| answer type | responses | scorer | as expected | missed | misread |",
        "|---|---|---|---|---|---|",
    ]
    for kind in (*ANSWER_TYPES, "all"):
        part = [row for row in rows if kind in ("all", row["answer_type"])]
        for rule in RULES if part else ():
            found = [outcome(row, rule) for row in part]
            shares = [100 * found.count(name) / len(found) for name in ("as expected", "missed", "misread")]
            lines.append(
                f"| {kind} | {len(part)} | {rule} | " + " | ".join(f"{s:.1f}%" for s in shares) + " |"
            )
    return "\n".join(lines)


@reports_errors()
def main(arguments: list[str]) -> int:
    """Exit code 0, 2 for bad input."""
    if len(arguments) != 1:
        raise UserError("give one file of crafted responses (JSON lines).")
    try:
        lines = Path(arguments[0]).read_text(encoding="utf-8").splitlines()
        shown = table([json.loads(line) for line in lines])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{arguments[0]}: not a file of crafted responses ({error}).") from error
    print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
