"""An optional LLM judge beside the rules. Off by default.

The strict scorer asks it only for what the parser could not read, and for short or free texts that differ from the gold
text: a parsed letter, yes/no or number is final, correct or not. A judge that fails (no answer, or an answer that is
neither yes nor no) is a third state: asked again by the next run, counted in the table, and never scored. The official
scorer does as the published evaluation: it asks for everything that the rules did not find right, and whatever is not
exactly "yes" is a "no".

Replies are kept by what was asked, so that the two scorers share those questions in which their texts are the same, and
each reads the replies by its own rule. Another judge's replies are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vopd.common import chat_client, control_tokens, jsonl
from vopd.common.chat_client import NoAnswerError, together
from vopd.common.provenance import hash_json
from vopd.errors import UserError
from vopd.evaluation.records import Record
from vopd.evaluation.scoring import parse_answer
from vopd.evaluation.scoring.official import extracted

State = Literal["right", "wrong", "failed"]
Replies = Mapping[str, str | None]
"""What a judge replied by what it was asked (`Ask.key`); None where a call failed."""
TEXTS = ("short", "free")
MOST_FAILURES = 20  # in a row: then the judge is gone rather than a response odd

_QUESTION = """A model was asked a question about a picture. Decide whether its response gives the reference answer.

Question: {question}
Reference answer: {gold}
Response: {response}

Does the response commit itself to the reference answer? Reply with "yes" or "no" only."""


@dataclass(frozen=True)
class Ask:
    """What the judge is asked about one response."""

    id: str
    view: str
    question: str
    gold: str
    response: str

    @property
    def message(self) -> str:
        """The text it is sent."""
        text = _QUESTION.format(question=self.question, gold=self.gold, response=self.response)
        return control_tokens.escape(text, control_tokens.pattern())

    @property
    def request(self) -> dict[str, Any]:
        """The body of the request, but for the judge's name."""
        return {"messages": [{"role": "user", "content": self.message}], "temperature": 0}

    @property
    def key(self) -> str:
        """Equal for equal requests."""
        return hash_json(self.request)[:16]


def ask_of(record: Record, scorer: str) -> Ask | None:
    """What a scorer ("strict" or "official") asks about a record as its rules read it; None where nothing.

    To the strict scorer an empty response is simply incorrect; the published evaluation asks for it too, and shows the
    judge what it takes for the answer.
    """
    response = record.response
    if scorer == "official":
        wanted, response = not record.correct, extracted(record.response)
    else:
        differs = record.details["answer_type"] in TEXTS and not record.correct
        wanted = bool(response.strip()) and (record.parsed is None or differs)
    return Ask(record.id, record.view, record.prompt, record.gold, response) if wanted else None


def state(reply: str | None, scorer: str) -> State:
    """What a reply (None: a call that failed) says to a scorer. "failed" counts as "wrong" to the official one."""
    if reply is None:
        return "failed"
    if scorer == "official":
        return "right" if reply.strip().lower() == "yes" else "wrong"
    said = parse_answer(reply, "yes/no").value
    return "failed" if said is None else ("right" if said == "yes" else "wrong")


def read_replies(path: Path, model: str | None = None) -> dict[str, str | None]:
    """Last reply to each question; a line torn by a kill is none.

    model: of the judge, or None: whoever gave the last reply. UserError naming a line that holds none.
    """
    lines: list[tuple[str, str, str | None]] = []
    for number, fields in jsonl.objects(path.read_bytes() if path.is_file() else b"", path):
        names = [fields.get(key) for key in ("id", "view", "judge")]
        reply = fields.get("reply", 0)
        if not all(isinstance(name, str) for name in names) or not isinstance(reply, str | None):
            raise UserError(f"Line {number} of {path} holds no verdict; remove the line or the file.")
        lines.append((str(fields["judge"]), str(fields.get("asked")), reply))
    model = model or (lines[-1][0] if lines else None)
    return {asked: reply for judge, asked, reply in lines if judge == model}


def unanswered(asks: Iterable[Ask], scorer: str, replies: Replies) -> list[Ask]:
    """Those whose reply is missing or failed, each request once."""
    once = {ask.key: ask for ask in asks}
    return [ask for key, ask in once.items() if state(replies.get(key), scorer) == "failed"]


async def judge(
    url: str, model: str, asks: Sequence[Ask], path: Path, concurrency: int, timeout: float,
    advance: Callable[[], None],
) -> list[str]:  # fmt: skip
    """Send what is asked; replies are appended as they arrive.

    Returns a sentence for each that the judge gave no answer to. After MOST_FAILURES of them in a row no more is asked.
    """
    todo = iter(asks)
    failures: list[str] = []
    in_a_row = 0

    async def worker() -> None:
        nonlocal in_a_row
        for ask in todo:
            if in_a_row >= MOST_FAILURES:
                return
            line: dict[str, Any] = {"id": ask.id, "view": ask.view, "judge": model, "asked": ask.key}
            try:
                line["reply"] = (await server.complete({"model": model, **ask.request})).text
                in_a_row = 0
            except NoAnswerError as error:
                line |= {"reply": None, "error": str(error)}
                failures.append(f"judge, {ask.id}/{ask.view}: {error}")
                in_a_row += 1
            file.append(line)
            advance()

    async with chat_client.Server(url, timeout) as server:
        with jsonl.Appender(path) as file:
            await together(worker() for _ in range(min(concurrency, len(asks))))
    return failures
