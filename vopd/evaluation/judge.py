"""An optional LLM judge for what the parser could not read. Off by default.

A parsed letter, yes/no or number is final, correct or not; only unparsed responses, and short or free texts that
differ from the gold text, are judged. A judge that fails (no answer, or an answer that is neither yes nor no) is a
third state: such a question is asked again by the next run, counted in the table, and never scored. Another judge's
verdicts are not reused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, cast, get_args

from vopd.common import chat_client, jsonl
from vopd.common.chat_client import NoAnswerError, together
from vopd.common.provenance import hash_json
from vopd.errors import UserError
from vopd.evaluation.records import Record
from vopd.evaluation.scoring import parse_answer

State = Literal["right", "wrong", "failed"]
TEXTS = ("short", "free")
MOST_FAILURES = 20  # in a row: then the judge is gone rather than a response odd

_QUESTION = """A model was asked a question about a picture. Decide whether its response gives the reference answer.

Question: {question}
Reference answer: {gold}
Response: {response}

Does the response commit itself to the reference answer? Reply with "yes" or "no" only."""
ASKED = hash_json(_QUESTION)[:16]
"""Stands in each verdict, so that one that was asked for with another prompt is not reused."""


def wants_judge(record: Record) -> bool:
    """Whether a response may go to the judge (see the module docstring); an empty one is simply incorrect."""
    differs = record.details["answer_type"] in TEXTS and not record.correct
    return bool(record.response.strip()) and (record.parsed is None or differs)


def read_verdicts(path: Path, model: str | None = None) -> dict[tuple[str, str], State]:
    """Last verdict of each question and view; a line torn by a kill is not a verdict.

    model: of the judge, or None: whoever gave the last verdict. Those of other judges, and of the same one asked with
    another prompt, do not count. UserError naming a line that holds none.
    """
    lines: list[tuple[str, tuple[str, str], State]] = []
    for number, fields in jsonl.objects(path.read_bytes() if path.is_file() else b"", path):
        name, view, verdict = (fields.get(key) for key in ("id", "view", "verdict"))
        if not (isinstance(name, str) and isinstance(view, str) and verdict in get_args(State)):
            raise UserError(f"Line {number} of {path} holds no verdict; remove the line or the file.")
        if fields.get("asked") == ASKED:
            lines.append((str(fields.get("judge")), (name, view), cast(State, verdict)))
    model = model or (lines[-1][0] if lines else None)
    return {key: verdict for judge, key, verdict in lines if judge == model}


async def judge(
    url: str, model: str, records: Sequence[Record], path: Path, concurrency: int, timeout: float,
    advance: Callable[[], None],
) -> list[str]:  # fmt: skip
    """Judge the records that want it and have no verdict of this judge yet; verdicts are appended as they arrive.

    Returns a sentence for each record that the judge gave no answer to. After MOST_FAILURES of them in a row no more
    is asked.
    """
    known = read_verdicts(path, model)
    wanting = [r for r in records if wants_judge(r) and known.get((r.id, r.view), "failed") == "failed"]
    todo = iter(wanting)
    failures: list[str] = []
    in_a_row = 0

    async def worker() -> None:
        nonlocal in_a_row
        for record in todo:
            if in_a_row >= MOST_FAILURES:
                return
            text = _QUESTION.format(question=record.prompt, gold=record.gold, response=record.response)
            body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0}
            try:
                reply = (await server.complete(body)).text
                in_a_row, says = 0, parse_answer(reply, "yes/no").value
            except NoAnswerError as error:
                reply, says = f"Error: {error}", None
                failures.append(f"judge, {record.split}/{record.id}/{record.view}: {error}")
                in_a_row += 1
            verdict = {"yes": "right", "no": "wrong", None: "failed"}[says]
            line = {"id": record.id, "view": record.view, "verdict": verdict, "judge": model, "reply": reply}
            file.append(line | {"asked": ASKED})
            advance()

    async with chat_client.Server(url, timeout) as server:
        with jsonl.Appender(path) as file:
            await together(worker() for _ in range(min(concurrency, len(wanting))))
    return failures
