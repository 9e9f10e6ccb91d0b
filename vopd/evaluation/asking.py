"""Ask what is missing: bounded concurrency, one record per question the moment it is answered.

A record file is only ever appended to. Killed at any point and started again, a run asks what has no record yet;
with all records there, nothing is asked. Questions that got no answer (server errors after retries) leave no
record either, and neither do those whose picture cannot be read.
"""

from __future__ import annotations

import dataclasses
import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vopd.common.chat_client import NoAnswerError, together
from vopd.common.images import PictureError
from vopd.errors import UserError
from vopd.evaluation.benchmark import Question, Questions
from vopd.evaluation.endpoint import Endpoint, Reply
from vopd.evaluation.records import Appender, Record, read_answers
from vopd.evaluation.scoring import is_correct, parse_answer

Key = tuple[str, str]  # question id, view
MOST_FAILURES = 20  # in a row: then the server is gone rather than a question odd


def missing(questions: Questions, views: list[str], rows: int, records: Path) -> list[tuple[Question, str]]:
    """Questions and views without a record, in order; rows > 0 keeps the first so many questions."""
    done: set[Key] = set()
    if records.is_file():
        done = {(r.id, r.view) for r in read_answers(records).records}
    asked = questions.questions[: rows or None]
    return [(q, view) for view in views for q in asked if view in q.views and (q.id, view) not in done]


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder; UserError when another evaluation is writing there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".writing").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{folder}: another evaluation is writing there; wait for it or end it."
            ) from error
        yield


async def ask(
    endpoint: Endpoint,
    questions: Questions,
    todo: list[tuple[Question, str]],
    records: Path,
    concurrency: int,
    advance: Callable[[], None],
) -> list[str]:
    """Ask `todo`, `concurrency` at a time; returns a sentence for each question that got no answer.

    UserError after MOST_FAILURES failures without an answer in between; what was answered is on disk.
    """
    failures: list[str] = []
    in_a_row = 0
    queue = iter(todo)

    async def worker(appender: Appender) -> None:
        nonlocal in_a_row
        for question, view in queue:
            key = f"{questions.name}/{question.id}/{view}"
            try:
                reply = await endpoint.answer(key, view, questions.picture(question, view), question.prompt)
            except PictureError as error:  # of this question alone; the server may be well
                failures.append(f"{key}: its picture {error}")
                continue
            except NoAnswerError as error:
                failures.append(f"{key}: {error}")
                in_a_row += 1
                if in_a_row >= MOST_FAILURES:
                    raise UserError(
                        f"{in_a_row} questions in a row got no answer; the last was {failures[-1]}"
                    ) from error
                continue
            in_a_row = 0
            appender.append(record(questions.name, question, view, reply, concurrency))
            advance()

    with Appender(records) as appender:
        await together(worker(appender) for _ in range(min(concurrency, len(todo))))
    return failures


def record(name: str, question: Question, view: str, reply: Reply, concurrency: int) -> Record:
    """The record of an answer, parsed strictly; all that scoring by another rule needs is in its details."""
    parsed = parse_answer(reply.text, question.answer_type, question.options)
    measured = dataclasses.asdict(reply)
    return Record(
        id=question.id,
        family=next(iter(question.groups.values()), name),
        view=view,
        split=name,
        prompt=question.prompt,
        response=measured.pop("text"),
        response_tokens=measured.pop("response_tokens"),
        truncated=measured.pop("truncated"),
        parsed=parsed.value,
        gold=question.answer,
        correct=is_correct(parsed, question.answer, question.answer_type),
        details={
            "answer_type": question.answer_type,
            "options": list(question.options),
            "groups": dict(question.groups),
            "cluster": question.cluster,
            "concurrency": concurrency,
            **measured,
        },
    )
