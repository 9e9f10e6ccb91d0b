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

_THINK_OPEN = re.compile(r"<(?:think|thinking|reasoning)>|◁think▷|\[think\]", re.I)
_THINK_CLOSE = re.compile(r"</(?:think|thinking|reasoning)>|◁/think▷|\[/think\]", re.I)
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>\n]{1,40}\|>|</?s>")
_LINE_BREAK = re.compile(r"\r\n?|[\v\f\x85\u2028\u2029]|<br ?/?>")
_INVISIBLE = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad\ufe0e\ufe0f]")
_HTML_STYLE = re.compile(r"</?(?:b|strong|i|em|u|p|span|code|center|mark)>")
_LATEX_STYLE = re.compile(
    r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathit|mathsf|boldsymbol|operatorname|underline|rm|bf) ?"
    r"\{([^{}]{0,300})\}"
)
_LATEX_DELIMITER = re.compile(r"\\[()\[\]]")
_LATEX_SPACE = re.compile(r"\\[,;:! ]|\\quad|\\left|\\right")
_BOX = re.compile(r"\\(?:boxed|fbox|framebox) ?\{([^{}]{0,300})\}|<answer>([^<>]{0,2000})</answer>", re.I)
_ANSWER_TAG = re.compile(r"</?answer>|\[/?(?:final )?answer\]", re.I)
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
    text = text.replace(BOX_OPEN, " ").replace(BOX_CLOSE, " ")
    text = unicodedata.normalize("NFKC", text)
    text = _LINE_BREAK.sub("\n", _SPECIAL_TOKEN.sub(" ", text))
    text = _INVISIBLE.sub("", text)
    text = text.replace("\u2019", "'").replace("\u2018", "'").replace("\u2212", "-")
    # Emoji and other pictures say nothing; arrows are mathematical signs and stay.
    text = "".join(" " if unicodedata.category(c) == "So" else c for c in text)
    text = _HTML_STYLE.sub("", text)
    text = re.sub(r"[*`$\"\u201c\u201d\u201e]|__", "", text)
    text = _LATEX_SPACE.sub(" ", _LATEX_DELIMITER.sub("", text))
    for _ in range(3):  # \boxed{\textbf{\text{B}}}: one wrapper a pass
        text = _LATEX_STYLE.sub(r"\1", text)
    text = re.sub(r"\\boxed ([A-Za-z0-9])(?![A-Za-z0-9])", r"\\boxed{\1}", text)
    text = _BOX.sub(lambda m: f" {BOX_OPEN}{m[1] if m[1] is not None else m[2]}{BOX_CLOSE} ", text)
    text = _ANSWER_TAG.sub("\nAnswer: ", text)
    text = _QUOTED_LETTER.sub(r"\1", text)
    text = _BRACKETED_LETTER.sub(r"(\1)", text)
    text = _NEWLINES.sub("\n", _SPACES.sub(" ", text)).strip()
    return _BULLET.sub("", text)


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
