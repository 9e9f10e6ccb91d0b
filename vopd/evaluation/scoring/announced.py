"""Announcements and rejections in one form each, whatever the language, before an answer type's rules look.

"Die richtige Antwort lautet B", "La respuesta es la opción B", "정답은 B입니다" and "答えはBです" become "the answer
is B"; "Antwort: B" becomes "Answer: B". "Wrong answer: B" and "Anything but B" become a REJECTION and "B", which no
rule takes for an answer.
"""

from __future__ import annotations

import re

REJECTION = "\u2298not "

_START = r"(?<![^\W_])"
_NOUN = r"(?:answer|option|choice|response|letter|pick|match|candidate)"
_WRONG = (
    r"(?:wrong|incorrect|false|worst|bad|rejected|excluded|eliminated|discarded|dismissed|impossible"
    r"|invalid"
    r"|unlikely|least likely|not (?:the|an?|my) (?:(?:correct|right|best|final) )?)"
)
_WRONG_ANSWER = re.compile(
    _START + rf"(?i:{_WRONG} ?(?:final )?{_NOUN}s?(?: here)?(?: ?(?:is|are|was|were|would be)[: ]{{1,2}}"
    rf"| ?[:=] ?| [-–—] )" + r"|(?:falsche|verkehrte) antwort(?: ist| lautet)? ?:? |(?:mauvaise"
    r"|fausse) réponse ?(?:est )?:? ?(?:la )?"
    + r"|réponse (?:fausse|incorrecte|erronée) ?(?:est )?:? ?|respuesta (?:incorrecta|equivocada"
    r"|falsa) ?(?:es )?:? ?"
    + r"|resposta (?:incorreta|errada) ?(?:é )?:? ?|risposta (?:sbagliata|errata) ?(?:è )?:? ?)"
    + r"|(?:错误|錯誤|不正确|排除)的?(?:答案|选项|選項)(?:是|为|為)?:? ?|오답(?:은|:) ?|(?:誤答|不正解)(?:は|:) ?"
)
# "Wrong: A, C" -- but not "You are wrong: A".
_WRONG_LIST = re.compile(
    r"(?:^|(?<=[\n.;!]) ?)(?i:wrong|incorrect|eliminated|excluded|rejected|ruled out"
    r"|not correct): ?(?=\(?[A-H](?![A-Za-z']))"
    r"|(?:^|(?<=\n))(?i:(?:the )?(?:wrong|incorrect) (?:answer|option|choice)s?)\n"
)
_ALL_BUT = re.compile(
    _START + rf"(?i:(?:anything|everything|any(?: {_NOUN}| one| of them)?|all(?: of them| {_NOUN}s)?"
    rf"|every(?: {_NOUN}| one)"
    + r"|each)(?: else)? (?:but|except|besides|other than|apart from|save|excluding)(?: for)? "
    + rf"(?:the )?(?:{_NOUN} )?)(?!certain|impossible|so\b|i\b|it\b|that\b|my\b|the\b)"
)

_OF_LETTER = (
    r"(?:(?: (?:die|der|das|la|le|el|lo|a|o)| l')(?= ?(?:option|antwort|buchstabe|réponse|lettre|opción"
    r"|respuesta"
    r"|letra|opção|alternativa|opzione|lettera)|\W?[A-H](?!\w)))?(?: ?(?:option|antwort|buchstabe"
    r"|réponse|lettre|opción"
    r"|respuesta|letra|opção|alternativa|opzione|lettera)(?!\w))?"
)
_ANSWER_IS = re.compile(
    r"(?i:" + _START + r"(?:die )?(?:(?:richtige|korrekte|beste|passende|endgültige) )?(?:antwort"
    r"|lösung)(?: hier)? (?:ist|lautet)(?: also| daher)?"
    + _OF_LETTER
    + r"[: ]{1,2}|"
    + _START
    + r"(?:richtig|korrekt) ist"
    + _OF_LETTER
    + r"[: ]{1,2}|"
    + _START
    + r"(?:la )?(?:(?:bonne|meilleure) )?(?:réponse|option)(?: (?:correcte|exacte|finale"
    r"|juste))? est(?: donc)?"
    + _OF_LETTER
    + r"[: ]{1,2}|"
    + _START
    + r"(?:la )?(?:mejor )?(?:respuesta|opción)(?: (?:correcta|final|adecuada))? (?:es|sería entonces)"
    + _OF_LETTER
    + r"[: ]{1,2}|"
    + _START
    + r"(?:la |a )?(?:risposta|resposta)(?: (?:corretta|correta|giusta|certa|finale?))? [èé]"
    + _OF_LETTER
    + r"[: ]{1,2})"
    + r"|(?<![가-힣])(?:최종 ?)?(?:정답|답변|답)(?:은|는) ?:? ?(?:바로 )?"
    + r"|(?:答え|正解|正答|解答|回答)(?:は|、) ?:? ?(?:選択肢 ?)?"
)
_ANSWER = re.compile(
    _START + r"(?i:(?:(?:richtige|korrekte|endgültige|bonne|mejor) )?(?:antwort|lösung|réponse|respuesta"
    r"|resposta|risposta)"
    + r"(?: (?:correcte|finale?|exacte|correcta|correta|corretta))?) ?:\s?"
    + r"|(?<![가-힣])(?:최종 ?)?(?:정답|답변|답) ?:\s?|(?:答え|正解|正答|解答|回答|正しい選択肢) ?:\s?"
)
_CHOOSE = re.compile(
    _START + r"(?i:ich (?:wähle|nehme|tippe auf|entscheide mich für)|je (?:choisis|sélectionne|choisirais"
    r"|dirais)|j'opte pour" + r"|(?:elijo|escojo|selecciono|scelgo|escolho))(?i:" + _OF_LETTER + r") "
)
_IS_CORRECT = re.compile(
    r"(?:(?<=[A-Ha-h])|(?<=[A-Ha-h]\))) (?i:(?:ist|est|es|é|è) (?:also |donc )?(?:die |la "
    r"|a )?(?:richtige?|korrekte?|bonne|correcte"
    r"|correcta|correta|corretta)(?: (?:antwort|réponse|respuesta|resposta|risposta))?)(?!\w)"
    r"|(?<=[A-Ha-h])(?:번)?(?:이|가) (?:정답|맞)|(?<=[A-Ha-h])が(?:正解|正しい)"
)


def announced(text: str, short: bool = False) -> str:
    """A cleaned text with its announcements in English and its rejections marked.

    short: the answer is a text of its own, in which "everything but the girl" rejects nothing.
    """
    text = _WRONG_LIST.sub(REJECTION, _WRONG_ANSWER.sub(REJECTION, text))
    if not short:
        text = _ALL_BUT.sub(REJECTION, text)
    text = _ANSWER.sub("Answer: ", _ANSWER_IS.sub("the answer is ", text))
    return _IS_CORRECT.sub(" is correct", _CHOOSE.sub("I choose ", text))
