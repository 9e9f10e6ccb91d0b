"""Text from outside on a terminal and in Markdown: it is shown, and does nothing."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress, TextColumn
from rich.table import Table

from vopd.common import markdown, terminal
from vopd.common.redaction import check_address, redacted
from vopd.config import ROOT
from vopd.errors import UserError

HOSTILE = {
    "colour": "\x1b[31mred",
    "clear": "\x1b[2J\x1b[H",
    "clipboard": "\x1b]52;c;aGVsbG8=\x07",
    "link": "\x1b]8;;https://example.org\x1b\\here\x1b]8;;\x1b\\",
    "title": "\x1b]0;owned\x07",
    "c1": "\x9b31m and \x9d0;owned\x9c",
    "return": "all is well\rall is not",
    "backspace": "no\x08\x08yes",
    "bidi": "\u202egpj.exe\u202c \u2066x\u2069",
    "tags": "a\U000e0041",
    "surrogate": "\udcff",
    "delete": "\x7f",
    "markup": "[bold red]x[/] [link=https://example.org]y[/link] :warning:",
    "bracket": "[/no such style]",
}
SEQUENCE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@given(st.text() | st.sampled_from(list(HOSTILE.values())))
def test_nothing_that_a_terminal_acts_upon_is_left(text: str) -> None:
    shown = terminal.visible(text)
    assert not SEQUENCE.search(shown)
    assert len(shown) == len(text) and terminal.visible(shown) == shown
    shown.encode()


def test_ordinary_text_stays_as_it_is() -> None:
    for text in ("a\tb\nc", "größer, 你好, שלום, فارسی می‌خوانم", "👩\u200d🔬", "[64.0, 69.7] <b> & `x`"):
        assert terminal.visible(text) == text


def printed(show) -> str:  # type: ignore[no-untyped-def]
    """What a coloured terminal is sent."""
    file = io.StringIO()
    show(terminal.Terminal(file=file, force_terminal=True, width=200, color_system="truecolor"))
    return file.getvalue()


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_terminal_shows_text_and_sends_no_sequence_but_its_own(text: str) -> None:
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    own = printed(
        lambda console: (console.print("x"), console.print("x", style="dim"), console.print(Table("x")))
    )
    sent = printed(
        lambda c: (c.print(text), c.print(text, style="dim"), c.print(table), c.print(text, soft_wrap=True))
    )
    sequences = re.findall(r"\x1b\[[0-9;]*m", sent)
    assert set(sequences) <= {*re.findall(r"\x1b\[[0-9;]*m", own), "\x1b[1m", "\x1b[3m"}
    rest = re.sub(r"\x1b\[[0-9;]*m", "", sent)
    assert not SEQUENCE.search(rest.replace("\n", ""))
    if "[" in text and "\x1b" not in text:
        assert text in rest


def test_a_progress_bar_shows_its_description_as_text() -> None:
    def show(console: terminal.Terminal) -> None:
        with Progress(TextColumn("{task.description}", markup=False), console=console) as bar:
            bar.add_task(HOSTILE["clipboard"] + HOSTILE["bracket"])

    sent = printed(show)
    assert "]52;c;" in sent and "\x1b]52" not in sent and HOSTILE["bracket"][:-1] in sent


def test_a_sentence_is_one_line_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say("vopd: bad \x1b[2J file\nvopd: all is well\u2028really", "second")
    assert capsys.readouterr().err == "vopd: bad ␛[2J file vopd: all is well really\nsecond\n"


# ---- Markdown -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a|b\nc", "a\\|b c"),
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)>"),
        ("&lt;script&gt;", "&amp;lt;script&amp;gt;"),
        ("&#x202e;", "&amp;#x202e;"),
        ("[here](javascript:alert(1))", "[here]\\(javascript:alert(1))"),
        ("![x](https://example.org/seen.png)", "![x]\\(https://example.org/seen.png)"),
        ("`rm` *now* \\", "\\`rm\\` \\*now\\* \\\\"),
        ("66.9 [64.0, 69.7]", "66.9 [64.0, 69.7]"),
        ("\x1b[31m\u202e", "␛[31m\ufffd"),
    ],
)
def test_markdown_shows_what_is_there(text: str, written: str) -> None:
    assert markdown.escaped(text) == written


@given(st.text(st.sampled_from("|<`[](!&\n\\ x"), max_size=20))
def test_no_cell_ends_and_no_tag_or_link_begins(text: str) -> None:
    line = markdown.escaped(text)
    unescaped = re.sub(r"\\[\\|*`(]", "x", line)
    assert "\n" not in line and "<" not in line
    assert not set("|`") & set(unescaped) and "](" not in unescaped


@given(st.text(st.sampled_from("`a\n")))
def test_nothing_ends_a_block_of_code(text: str) -> None:
    block = markdown.fenced(text, "yaml")
    fence = block.split("yaml")[0]
    assert set(fence) == {"`"} and fence not in text
    assert block == f"{fence}yaml\n{text}\n{fence}"


# ---- secrets --------------------------------------------------------------------------------------------------------


def test_a_secret_of_the_environment_is_shown_by_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_API_KEY", "canary123")
    monkeypatch.setenv("HF_TOKEN", "canary123-and-more")
    monkeypatch.setenv("SHORT_KEY", "none")
    monkeypatch.setenv("TOKEN_FOLDER", "/some/folder")
    assert redacted("bad key canary123: none, /some/folder") == "bad key <MY_API_KEY>: none, /some/folder"
    assert redacted("canary123-and-more") == "<HF_TOKEN>"
    terminal.say("401: canary123 is not valid")
    assert capsys.readouterr().err == "401: <MY_API_KEY> is not valid\n"


@pytest.mark.parametrize("address", ["http://me:canary123@host/v1", "https://canary123@host", "http://[::1"])
def test_an_address_with_a_password_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(UserError, match=r"^endpoint: ") as caught:
        check_address("endpoint", address)
    assert "canary123" not in str(caught.value)
    check_address("endpoint", "http://127.0.0.1:8000/v1")
    check_address("endpoint", None)


# ---- everywhere -----------------------------------------------------------------------------------------------------


def test_sentences_and_consoles_of_ours_go_through_this_module() -> None:
    """Each of these would print what a file's name or an error holds as it is."""
    wrong = []
    for file in sorted(
        path for folder in ("vopd", "data", "baselines") for path in (ROOT / folder).rglob("*.py")
    ):
        if file == ROOT / "vopd" / "common" / "terminal.py":
            continue
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if re.search(r"\bConsole\((?!\w+:)|(?<!\.)\bprint\(f\"[\w.]+: \{|: \{error\}.*sys\.stderr", line):
                wrong.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    assert wrong == []
