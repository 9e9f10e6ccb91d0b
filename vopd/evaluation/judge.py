"""An optional LLM judge for what the parser could not read. Off by default.

A parsed letter, yes/no or number is final, right or wrong; only unparsed responses, and short or free texts that
differ from the gold text, are judged. A judge that fails (no answer, or an answer that is neither yes nor no) is a
third state: such a question is asked again by the next run, counted in the table, and never scored.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from vopd.evaluation.records import Record, drop_torn_line
from vopd.evaluation.scoring import parse_answer
from vopd.provenance import hash_json

State = Literal["right", "wrong", "failed"]
TEXTS = ("short", "free")

_QUESTION = """A model was asked a question about a picture. Decide whether its response gives the reference answer.

Question: {question}
Reference answer: {gold}
Response: {response}

Does the response commit itself to the reference answer? Reply with "yes" or "no" only."""
ASKED = hash_json(_QUESTION)[:16]
"""Stands in each verdict, so that one that was asked for with other words is not taken for one of today's."""


def wants_judge(record: Record) -> bool:
    """Whether a response may go to the judge (see the module docstring); an empty one is simply not right."""
    differs = record.details["answer_type"] in TEXTS and not record.correct
    return bool(record.response.strip()) and (record.parsed is None or differs)


def read_verdicts(path: Path, judge: str | None = None) -> dict[tuple[str, str], State]:
    """Last verdict of each question and view; a line torn by a kill is no verdict.

    judge: its model's name, or None: whoever gave the last verdict. Those of other judges, and of the same one asked
    with other words, do not count.
    """
    lines = []
    if path.is_file():
        complete = path.read_text(encoding="utf-8").rpartition("\n")[0]
        lines = [json.loads(line) for line in complete.splitlines()]
    lines = [fields for fields in lines if fields.get("asked") == ASKED]
    judge = judge or (lines[-1]["judge"] if lines else None)
    return {(f["id"], f["view"]): f["verdict"] for f in lines if f["judge"] == judge}


async def judge(
    url: str, model: str, records: Sequence[Record], path: Path, concurrency: int, timeout: float,
    advance: Callable[[], None],
) -> None:  # fmt: skip
    """Judge the records that want it and have no verdict yet; verdicts are appended to `path` as they arrive."""
    import openai

    from vopd.evaluation.engines import client

    known = read_verdicts(path, model)
    todo = iter([r for r in records if wants_judge(r) and known.get((r.id, r.view), "failed") == "failed"])
    server = client(url, timeout)
    if path.is_file():
        drop_torn_line(path)

    async def worker() -> None:
        for record in todo:
            text = _QUESTION.format(question=record.prompt, gold=record.gold, response=record.response)
            try:
                answer = await server.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": text}], temperature=0
                )
                reply = (answer.choices[0].message.content or "") if answer.choices else ""
            except openai.OpenAIError as error:
                reply = f"Error: {type(error).__name__}"
            says = parse_answer(reply, "yes/no").value
            verdict = {"yes": "right", "no": "wrong", None: "failed"}[says]
            line = {"id": record.id, "view": record.view, "verdict": verdict, "judge": model, "reply": reply}
            line["asked"] = ASKED
            file.write(json.dumps(line) + "\n")
            file.flush()
            advance()

    with path.open("a", encoding="utf-8") as file:
        await asyncio.gather(*(worker() for _ in range(concurrency)))
