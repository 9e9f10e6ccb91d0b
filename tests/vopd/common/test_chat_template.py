"""A chat template is a program from outside: it ends in time and in bounds, or in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from vopd.common import chat_template
from vopd.config import ROOT
from vopd.errors import UserError

GOOD = (ROOT / "data" / "miniature" / "base" / "chat_template.jinja").read_text()
HOSTILE = {
    "subclasses": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "globals": ("{{ cycler.__init__.__globals__.os.popen('touch HERE').read() }}", "SecurityError"),
    "format": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "SecurityError"),
    "file": ("{% include '/etc/passwd' %}", "no loader"),
    "changes": ("{% set _ = messages.append(1) %}", "SecurityError"),
    "syntax": ("{% for", "TemplateSyntaxError"),
    "refuses": ("{{ raise_exception('no images\nhere') }}", "no images here"),
    "memory": ("{{ 'a' * 10**11 }}", "MemoryError"),
    "long": ("{{ 'a' * 10**7 }}", "makes 10000000 characters"),
    "range": ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
}


def test_a_good_template_passes() -> None:
    chat_template.check(GOOD, "base")


@pytest.mark.parametrize(("template", "why"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_is_refused(
    template: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^base: its chat template cannot render") as caught:
        chat_template.check(template, "base")
    assert why in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_template_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    inner = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match=r"more than 0\.3 seconds"):
        chat_template.check(inner, "base")


@pytest.mark.parametrize("template", [None, {"default": GOOD}, "x" * (chat_template.MOST_CHARACTERS + 1)])
def test_what_is_no_template_of_ordinary_size_is_refused(template: object) -> None:
    with pytest.raises(UserError, match=r"^base: its chat template"):
        chat_template.check(template, "base")
