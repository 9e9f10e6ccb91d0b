"""Control tokens in a text that someone wrote: split by a space, so that the model reads them as letters.

A tokenizer makes a special token of its characters wherever they stand: `<|im_end|>` in an option ends the turn, and an
image marker asks for a picture that is not there. The one rule, for every text that goes to a model (training,
evaluation, judge, synthesis): where such characters stand in a text, a space comes behind the first of them. It is
applied last, to the whole text of a message, since two pieces put together can make a token that neither holds; what
the chat template adds stays.

Refusing such rows instead would take questions out of benchmarks, whose figures then compare with nobody's. A space
rather than an invisible character, because some tokenizers drop those before they look for special tokens. Switching
special tokens off in the tokenizer would not reach a server.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vopd.errors import UserError

_QWEN = (
    r"<\|[^\s<>|]{1,40}\|>",  # <|im_start|>, <|endoftext|>, <|image_pad|>; also <|placeholder|> of its processor
    r"</?(?:think|tool_call|tool_response)>",
    r"<tts_[a-z_]{1,30}>",
    r"<(?:image|video|audio)>",
    r"<##[A-Z_]{1,20}##>",  # vLLM's markers of pictures in a text
)
MOST_PASSES = 50


def pattern(tokenizer: Any = None) -> re.Pattern[str]:
    """Control tokens of the Qwen family and image markers, and the special tokens of `tokenizer` if it is given."""
    special = (
        [] if tokenizer is None else {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    )
    own = sorted((re.escape(token) for token in special if token.strip()), key=len, reverse=True)
    return re.compile("|".join([*own, *_QWEN]))


def escape(text: str, tokens: re.Pattern[str]) -> str:
    """The text without any of `tokens` (a `pattern`): unchanged where it holds none.

    Raises:
        UserError: a token of one character, which cannot be split.
    """
    for _ in range(MOST_PASSES):  # tokens may overlap, and then one pass leaves the second of them
        text, found = tokens.subn(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        if not found:
            return text
    match = tokens.search(text)
    raise UserError(
        f"A text holds {match[0] if match else ''!r}, a special token of the model that cannot be split; take it out "
        f"of the text, which begins {text[:60]!r}."
    )


def escape_messages(messages: Sequence[Mapping[str, Any]], tokens: re.Pattern[str]) -> list[dict[str, Any]]:
    """Chat messages with every text escaped; contents are texts, or lists of parts of which those with a text count."""

    def part(content: Mapping[str, Any]) -> dict[str, Any]:
        return {**content, "text": escape(content["text"], tokens)} if "text" in content else {**content}

    def content(value: Any) -> Any:
        return escape(value, tokens) if isinstance(value, str) else [part(piece) for piece in value]

    return [{**message, "content": content(message["content"])} for message in messages]


def prompt(processor: Any, messages: Sequence[Mapping[str, Any]], template: Mapping[str, Any]) -> str:
    """The text that a model's chat template makes of messages for an answer, the messages' own texts escaped.

    processor: a Hugging Face processor with a chat template. template: extra arguments of it, e.g. `enable_thinking`.
    """
    escaped = escape_messages(messages, pattern(processor.tokenizer))
    text: str = processor.apply_chat_template(escaped, tokenize=False, add_generation_prompt=True, **template)
    return text
