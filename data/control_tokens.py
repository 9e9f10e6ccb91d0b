"""Tokens that steer a model and must not occur in the data's texts: the model would read another prompt than intended.

A tokenizer turns such a token into its control id wherever it is written, so `<|im_end|>` in an option ends the turn,
and an image marker asks for an image that is not there.
"""

import re
from typing import Any

_QWEN = (
    r"<\|[^\s<>|]{1,40}\|>",  # <|im_start|>, <|endoftext|>, <|vision_start|>, <|image_pad|>, ...
    r"</?(?:think|tool_call|tool_response)>",
    r"<(?:image|video)>",
)


def pattern(tokenizer: Any = None) -> re.Pattern[str]:
    """Control tokens of the Qwen family and image markers, and the special tokens of `tokenizer` if it is given."""
    special = (
        [] if tokenizer is None else {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    )
    own = sorted((re.escape(token) for token in special if token.strip()), key=len, reverse=True)
    return re.compile("|".join([*own, *_QWEN]))
