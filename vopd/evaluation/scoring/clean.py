"""Bring a raw response into one plain form before any rule looks at it.

Everything that several answer types share is here: reasoning blocks are cut, full-width characters folded,
markdown and LaTeX wrappers removed, and the strongest final marker (a box or an <answer> tag) is turned into
one pair of brackets, BOX_OPEN and BOX_CLOSE. White space is collapsed, so that the rules' expressions need no
unbounded repeats and stay linear on any text.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

BOX_OPEN, BOX_CLOSE = "\u27e6", "\u27e7"

_THOUGHT = (
    r"(?:think|thinking|thoughts?|reasoning|reason|rationale|analysis|scratchpad|reflection|cot|seed:think)"
)
_THINK_OPEN = re.compile(rf"<{_THOUGHT}>|◁think▷|\[think\]", re.I)
_THINK_CLOSE = re.compile(rf"</{_THOUGHT}>|◁/think▷|\[/think\]|<\|channel\|>final<\|message\|>", re.I)
# What a reader of "\boxed" as an escape makes of it: a backspace before "oxed"; likewise "\text" and "\frac".
_ESCAPE_READ = {"\x08": "\\b", "\x0c": "\\f", "\t": "\\t"}
_READ_AS_ESCAPE = re.compile(
    r"\x08(?=[a-z])|\x0c(?=(?:box|rac|ramebox) ?\{)|\t(?=ext(?:bf|it|rm|tt"
    r"|color)? ?\{)"
)
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>\n]{1,40}\|>|</?s>")
_LINE_BREAK = re.compile(r"\r\n?|[\v\f\x85\u2028\u2029]|<br ?/?>")
_INVISIBLE = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad\ufe0e\ufe0f]")
_HTML_STYLE = re.compile(r"</?(?:b|strong|i|em|u|p|span|code|center|mark)>")
_LATEX_STYLE = re.compile(
    r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathit|mathsf|boldsymbol|operatorname"
    r"|underline|rm|bf|sf|it|tt|bm"
    r"|ensuremath|mbox|color ?\{[^{}]{0,40}\}|textcolor ?\{[^{}]{0,40}\}) ?"
    r"\{([^{}]{0,300})\}"
)
_LATEX_DECLARATION = re.compile(
    r"\\(?:tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge|displaystyle|textstyle"
    r"|scriptstyle|bfseries|itshape|rmfamily|sffamily|bf|it|rm|sf|tt|bm)(?![A-Za-z]) ?"
    r"|\\color ?\{[^{}]{0,40}\} ?"
)
_DOUBLE_BRACES = re.compile(r"(?<=\{) ?\{([^{}]{0,300})\} ?(?=\})")
_LATEX_DELIMITER = re.compile(r"\\[()\[\]]")
_LATEX_SPACE = re.compile(r"\\[,;:! ]|\\quad|\\left|\\right")
_BOX = re.compile(r"\\(?:boxed|fbox|framebox) ?\{([^{}]{0,300})\}", re.I)
_BOX_TOKENS = re.compile(r"<\|(?:begin|end)_of_box\|>")
_FINAL_TAG = r"(?:(?:final|correct)?[_ -]?answers?|ans|final|答案)"
# A closing tag is often misspelt or the opening one again; any tag after the content closes it.
_TAGGED = re.compile(
    rf"<{_FINAL_TAG}>([^<>]{{1,2000}})<[/\\]? ?[a-z_ 答案-]{{1,20}}>"
    rf"|\[(?:final )?answer\]([^\[\]<>]{{1,2000}})\[/(?:final )?answer\]",
    re.I,
)
# These hold more than the answer as often as not, so only a short content is one.
_LOOSELY_TAGGED = re.compile(
    r"<(choice|option|result|solution|output|response|conclusion|prediction)>([^<>]{1,80})</\1>", re.I
)
_OPENING_TAG = re.compile(rf"<{_FINAL_TAG}>|\[(?:final )?answer\]", re.I)
_CLOSING_TAG = re.compile(
    rf"</ ?(?:{_FINAL_TAG}|choice|option|result|solution|output|response)>|\[/(?:final )?answer\]", re.I
)
_KEY = (
    r"(?:(?:final|correct|predicted|my|the)?[_ -]?answer(?:[_ -]?(?:letter|option|choice))?"
    r"|(?:final|correct|selected|chosen|predicted|best)?[_ -]?(?:choice|option|letter|prediction|selection)"
    r"|final|(?:正确|最终)?答案|选项)"
)
# One entry of a JSON object or a dict: {"reasoning": "...", "answer": "B"}.
_ENTRY = re.compile(
    rf"""(?<=[{{,\n ])(["']){_KEY}\1\s?:\s?(\[\s?)?(?:"((?:[^"\\\n]|\\.){{0,2000}})"|'([^'\n]{{0,2000}})'"""
    r"""|(-?[\d.]{1,20}|[A-Za-z]|true|false)(?=\s?[,\]}\n])|(?:null|none|nan)(?=\s?[,\]}\n]))(?(2)\s?\])""",
    re.I,
)
_HEADED = re.compile(
    r"[【\[「『〖《〔] ?((?:正确|最终|参考|標準|标准|正確)?答案|答|正解|정답) ?[】\]」』〗》〕] ?:? ?"
)
_QUOTED_LETTER = re.compile(r"'([A-Za-z])'")
_BRACKETED_LETTER = re.compile(r"[(\[{【「『<〈《〔]{1,3} ?([A-Za-z]) ?[)\]}】」』>〉》〕]{1,3}")
_BULLET = re.compile(r"^(?:[-•>‣] |#{1,6} ?)+", re.M)
_SPACES = re.compile(r"[^\S\n]+")
_NEWLINES = re.compile(r" ?\n[ \n]*")

_ERROR = re.compile(
    r"""["'\[(]?(?:
      (?:(?:an|the|unexpected|unknown|internal|server|api|http|connection|network|request|runtime|cuda|client|
          fatal|timeout|rate|limit|openai|vllm)[ _-]){0,4}
        [a-z_.]{0,60}(?:error|exception)(?![a-z])(?:\ ?[:(\[\]]|\ -\ |\ code|\ ?\d|\.?\s*$|\ occurred|\ while)
      |traceback\ \(most\ recent
      |failed\ to\ (?:obtain|get|generate|fetch|connect|process|load|parse)
      |(?:http\ )?(?:status\ )?(?:code\ )?[45]\d\d:?\ (?:bad|unauthorized|forbidden|not\ found|too\ many|
          internal|service|gateway|server|client|request)
      |(?:the\ )?(?:request|connection)\ (?:timed\ out|refused|reset|failed)
      |(?:time(?:d\ |-)?out|rate\ limit|bad\ gateway|bad\ request|service\ unavailable|(?:cuda\ )?out\ of\ memory)
      |\{\s?["']?error
      |(?:none|null|nan|n/a)\.?\s*$
    )""",
    re.I | re.X,
)
_REFUSAL = re.compile(
    r"(?:can ?not|can't|could not|couldn't|unable to|not able to|won't|will not) (?:[a-z]{1,20} )?"
    r"(?:answer|help|assist|determine|tell|comply|say|provide|identify|know|process|view|make out"
    r"|read|see|count|find|recogni[sz]e)(?![a-z])"
    r"|(?:do not|don't) (?:know|have enough)"
    r"|(?:cannot|can not|can't|could not) be (?:determined|answered|identified|seen|known)"
    r"|not (?:legible|readable|discernible)|illegible|unreadable"
    r"|not (?:sure|enough information|possible|certain)|insufficient information|no idea|as an ai(?![a-z])"
    r"|(?:i'm|i am|we're) sorry|^sorry(?![a-z])|(?:cannot|can't|don't|do not) see (?:the|an|any) image"
    r"|无法|不能确定|不知道|看不清|抱歉|不确定",
    re.I,
)


def cut_reasoning(text: str) -> str | None:
    """Text after the last closed reasoning block; None when a block was opened and never closed."""
    closes = list(_THINK_CLOSE.finditer(text))
    rest = text[closes[-1].end() :] if closes else text
    return None if _THINK_OPEN.search(rest) else rest


def clean(text: str) -> str:
    """Plain lines separated by single newlines; see the module docstring. Never raises."""
    text = text.replace(BOX_OPEN, " ").replace(BOX_CLOSE, " ").replace("\u2298", " ")
    text = _READ_AS_ESCAPE.sub(lambda m: _ESCAPE_READ[m[0]], text)
    text = _BOX_TOKENS.sub(lambda m: "<answer>" if "begin" in m[0] else "</answer>", text)
    text = unicodedata.normalize("NFKC", text)
    text = _LINE_BREAK.sub("\n", _SPECIAL_TOKEN.sub(" ", text))
    text = _INVISIBLE.sub("", text)
    text = text.replace("\u2019", "'").replace("\u2018", "'").replace("\u2212", "-")
    # Emoji and other pictures say nothing; arrows are mathematical signs and stay.
    text = "".join(" " if unicodedata.category(c) == "So" else c for c in text)
    text = _HTML_STYLE.sub("", text)
    text = _ENTRY.sub(_entry, text)
    text = re.sub(r"[*`$\"\u201c\u201d\u201e]|__", "", text)
    text = _LATEX_SPACE.sub(" ", _LATEX_DELIMITER.sub("", text))
    text = _LATEX_DECLARATION.sub("", text)
    for _ in range(3):  # \boxed{\textbf{\text{B}}}: one wrapper a pass
        text = _DOUBLE_BRACES.sub(r"\1", _LATEX_STYLE.sub(r"\1", text))
    text = re.sub(r"\\boxed ([A-Za-z0-9])(?![A-Za-z0-9])", r"\\boxed{\1}", text)
    text = _BOX.sub(f" {BOX_OPEN}\\1{BOX_CLOSE} ", text)
    text = _TAGGED.sub(lambda m: _boxed(m[1] or m[2]), text)
    text = _LOOSELY_TAGGED.sub(lambda m: _boxed(m[2]), text)
    text = _OPENING_TAG.sub("\nAnswer: ", _CLOSING_TAG.sub("\n", text))
    text = _HEADED.sub(r"\n\1: ", text)
    text = _QUOTED_LETTER.sub(r"\1", text)
    text = _BRACKETED_LETTER.sub(r"(\1)", text)
    text = _NEWLINES.sub("\n", _SPACES.sub(" ", text)).strip()
    return _BULLET.sub("", text)


def _boxed(content: str) -> str:
    """The content of an answer tag as a box; a box inside it stays the box."""
    return f"\n{content}\n" if BOX_OPEN in content else f" {BOX_OPEN}{content}{BOX_CLOSE} "


def _entry(match: re.Match[str]) -> str:
    """The value of an answer key as a box; a null says that there is no answer, and leaves nothing."""
    value = next((match[i] for i in (3, 4, 5) if match[i] is not None), None)
    return "" if value is None else _boxed(value)


def is_error(text: str) -> bool:
    """Whether the text is a failed call's message and not a model's words."""
    return _ERROR.match(text.strip()[:400]) is not None


def is_refusal(text: str) -> bool:
    """Whether the text declines to answer or says that it cannot."""
    return _REFUSAL.search(text) is not None


_LEAD_IN = re.compile(
    r"(?:so|therefore|thus|hence)?,? ?(?:the |my )?(?:final |correct |right |best |most likely )?"
    r"(?:answer|option|choice) (?:is|would be|should be)[: ]{1,2}"
    r"|(?:so|therefore|thus|hence)?,? ?(?:it is|it's|this is|that is|that's|they are|i think|i believe)"
    r"(?: it is| it's| the answer is)? |(?:正确)?答案(?:是|为|:) ?",
    re.I,
)
_ARTICLE = re.compile(r"(?:a|an|the) ", re.I)
_EDGE = " \n\t.,;:!?。、()[]{}" + BOX_OPEN + BOX_CLOSE


def strip_lead_in(claim: str) -> str:
    """A claim without its introduction ("The answer is", "It's") and edge punctuation."""
    claim = claim.strip()
    lead = _LEAD_IN.match(claim)
    return (claim[lead.end() :] if lead else claim).strip(_EDGE)


@lru_cache(maxsize=4096)  # options are compared with many claims
def comparable(claim: str) -> str:
    """Form in which short texts are compared: folded, lower case, no edge punctuation, no leading article."""
    folded = (
        _SPACES.sub(" ", unicodedata.normalize("NFKC", claim)).replace("\u2019", "'").casefold().strip(_EDGE)
    )
    return _ARTICLE.sub("", folded, count=1) if _ARTICLE.match(folded) else folded
