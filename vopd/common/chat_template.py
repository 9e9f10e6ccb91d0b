"""Whether a model's chat template, which is a program from outside, ends in time and in bounds.

transformers runs templates in a sandbox: they reach neither files nor Python's own objects, and change nothing. A
sandbox does not keep one from running for ever or filling the memory, so one question is rendered here first, in a
process of its own with limits.
"""

from __future__ import annotations

import multiprocessing
import resource
from multiprocessing.connection import Connection
from typing import Any

import psutil

from vopd.errors import UserError

SECONDS = 20.0  # templates take thousandths
MEMORY_BYTES = 2**30
MOST_CHARACTERS = 2**20  # of a template, and of what it makes of one short question
QUESTION = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the ball?"}]}
]


def check(template: Any, model: str) -> None:
    """Refuse a template (as a processor holds it) that cannot render a question with an image within bounds.

    Raises:
        UserError: it is not text, too long, fails, or breaks a bound; names the model.
    """
    if not isinstance(template, str):
        raise UserError(
            f"{model}: its chat template is not text; copy chat_template.jinja from the original."
        )
    if len(template) > MOST_CHARACTERS:
        raise UserError(f"{model}: its chat template has more than {MOST_CHARACTERS} characters; shorten it.")
    # Imported before the fork, which then takes thousandths of a second.
    from transformers.utils import chat_template_utils  # noqa: F401

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_report, args=(template, sender), daemon=True)
    child.start()
    sender.close()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        child.join()
        raise UserError(f"{model}: its chat template takes more than {SECONDS:g} seconds for one question.")
    try:
        said = receiver.recv_bytes(MOST_CHARACTERS).decode()
    except (EOFError, OSError):  # ended without a word
        said = "its process died"
    if said:
        raise UserError(f"{model}: its chat template cannot render a question with an image ({said}).")


def _report(template: str, sender: Connection) -> None:
    """In the child: an empty message, or why it does not work."""
    from transformers.utils.chat_template_utils import render_jinja_template

    most = psutil.Process().memory_info().vms + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    said = ""
    try:
        (text,), _ = render_jinja_template(
            [QUESTION], chat_template=template, add_generation_prompt=True, enable_thinking=False
        )
        if len(text) > MOST_CHARACTERS:
            said = f"it makes {len(text)} characters of it, more than {MOST_CHARACTERS}"
    except Exception as error:  # the process's boundary: whatever the template does, the parent says it
        said = f"{type(error).__name__}: {error}"[:300]
    sender.send_bytes(" ".join(said.split()).encode(errors="replace"))
