"""Whether the trackers that a run asks for can work, found out in seconds before anything starts.

Without a key or a network, wandb waits for minutes and then ends the run. Its files can as well be written into the run
folder alone (WANDB_MODE=offline) and sent later (`wandb sync`).
"""

from __future__ import annotations

import netrc
import os
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from urllib.parse import urlsplit

import httpx

from vopd.errors import UserError

PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard"}
SERVER = "https://api.wandb.ai"
SECONDS = 5.0
ALONE = ("offline", "disabled", "dryrun")  # values of WANDB_MODE that need no server
OFFLINE = "set WANDB_MODE=offline to keep its files in the run folder, or logging.wandb=false"


def check(logging: Mapping[str, object]) -> None:
    """Refuse trackers whose package is absent, and wandb without a key or without its server in reach.

    Raises:
        UserError: names the setting and says what to do.
    """
    for name, package in PACKAGES.items():
        if logging[name] and find_spec(package) is None:
            raise UserError(f"logging.{name}=true: the package {package} is not installed.")
    if not logging["wandb"] or os.environ.get("WANDB_MODE") in ALONE:
        return
    server = os.environ.get("WANDB_BASE_URL", SERVER)
    if not _has_key(server):
        raise UserError(f"logging.wandb=true: there is no key for {server}; set WANDB_API_KEY, or {OFFLINE}.")
    if why := unreachable(server):
        raise UserError(f"logging.wandb=true: {server} does not answer ({why}); {OFFLINE}.")


def unreachable(server: str, seconds: float = SECONDS) -> str | None:
    """Why no answer of any kind comes from `server` within twice this time; None if one comes."""
    said: list[str] = []

    def ask() -> None:
        try:
            httpx.head(server, timeout=seconds)
            said.append("")
        except (httpx.HTTPError, httpx.InvalidURL, ImportError) as error:  # ImportError: a proxy by SOCKS
            said.append(str(error) or type(error).__name__)

    # A thread, for a name is looked up without any limit of ours.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * seconds)
    return (said[0] or None) if said else f"no answer in {2 * seconds:g} seconds"


def _has_key(server: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return known.authenticators(urlsplit(server).hostname or "") is not None
