"""Secrets of the environment in text that is written or shown, such as a server's refusal that repeats the key."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from vopd.errors import UserError

SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
SHORTEST = 8  # shorter values are words such as "none" that occur in other places too


def redacted(text: str) -> str:
    """The text with the values of variables that are named like secrets replaced by the variables' names."""
    secrets = {value: name for name, value in os.environ.items() if SECRET.search(name)}
    for value in sorted((v for v in secrets if len(v) >= SHORTEST), key=len, reverse=True):
        text = text.replace(value, f"<{secrets[value]}>")
    return text


def check_address(key: str, address: str | None) -> None:
    """Refuse a server's address that holds a user or a password: addresses are written down and shown.

    Raises:
        UserError: names the setting, and not its value.
    """
    try:
        parts = urlsplit(address or "")
    except ValueError as error:
        raise UserError(f"{key}: not the address of a server ({error}).") from error
    if parts.username or parts.password:
        raise UserError(f"{key}: the address holds a user or password; give a key as OPENAI_API_KEY instead.")
