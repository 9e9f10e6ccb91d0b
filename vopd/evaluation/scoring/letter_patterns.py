"""The phrases by which responses state an option letter, in English and Chinese; `letters` gives them their rank.

Every repeat is bounded or over one character class, so that matching stays linear on any text. Each pattern's
last group is the letter.
"""

from __future__ import annotations

import re

from vopd.evaluation.scoring.clean import BOX_CLOSE, BOX_OPEN


def _any(phrases: str) -> str:
    """Alternatives from a list separated by " | ", the longest first."""
    return "|".join(sorted(phrases.split(" | "), key=len, reverse=True))


NO_WORD_AFTER = r"(?![A-Za-z0-9_+#]|'[a-z]|-[A-Za-z0-9]|\.[A-Za-z]\.)"
LETTER = r"[(" + BOX_OPEN + r"]?\s?([A-Za-z])" + NO_WORD_AFTER
WORD_START = r"(?<![A-Za-z])"

# Words that may stand between a cue and its letter without changing what is claimed.
_FILL_EN = _any(
    "the | correct | right | best | final | most | likely | probably | definitely | clearly | obviously | option"
    " | choice | letter | answer | is | it | it's | would | be | should | must | has to | simply | just | indeed"
    " | actually | both | either | i | i'd | think | believe | choose | select | pick | say | my | so | therefore"
    " | thus | that"
)
_FILL_ZH = _any("选项 | 選項 | 选择 | 選擇 | 选 | 選 | 应该是 | 應該是 | 应为 | 應為 | 是 | 为 | 為")
FILL = r"(?i:(?:" + _FILL_EN + r")(?:[,:]\s?|\s)|(?:" + _FILL_ZH + r") ?){0,8}"
FILL_LETTER = re.compile(FILL + LETTER)

_BE = _any(
    "is | was | would be | should be | must be | will be | has to be | seems to be | appears to be | 's"
)
_DECISION = _any("answer | choice | option | decision | selection | response | verdict")
FINAL = re.compile(
    WORD_START
    + r"(?i:final (?:"
    + _DECISION
    + r")(?: (?:"
    + _BE
    + r"))?|最[终終]答案(?:是|为|為|选|選)?) ?[:=\-–—]?\s?"
    + FILL
    + LETTER
)
_SEPARATOR = r" ?(?::{1,2}|=|->|=>|→|[-–—](?= ))\s?"
MARK = re.compile(
    WORD_START + r"(?i:(?<!wrong_)(?<!incorrect_)(?<!not_)(?:answer|ans)(?: choice| option| letter"
    r"| \([^()\n]{1,30}\))?(?: is)?" + r"|(?:答案|答)(?:是|为|為|选|選)?)" + _SEPARATOR
)
# These words also introduce other things than answers, so what follows them must be a letter or an option.
SOFT_MARK = re.compile(
    WORD_START + r"(?i:(?<!wrong_)(?<!incorrect_)(?<!not_)(?:choice|option|selection|selected|solution|result"
    r"|response|prediction|conclusion|output|verdict|final"
    + r"|correction|correct)(?: option| choice)?(?: is)?|(?:正确选项|正確選項|选项|選項)(?:是|为|為)?)"
    + _SEPARATOR
)
MARK_NO_COLON = re.compile(WORD_START + r"(?i:answer|ans\.)[ \n]\(?([A-Zb-h])(?=\)?[.!]?(?:\n|$))")
ANSWER_IS = re.compile(
    WORD_START + r"(?i:answer|(?:correct|right|best) (?:option|choice)) (?:is|would be|should be)[: ]{1,2}"
)

_NOUN = (
    _any("answer | option | choice | selection | pick | guess | conclusion")
    + r"|(?:correct|right|best|matching) (?:one|match|description|statement|letter|response)"
    + r"|(?:my|the (?:correct|right|best)) (?:response|reply|verdict|call|letter)"
    + r"|(?:only|best|correct|right) (?:option|choice|answer) [a-z' ]{1,50}"
    + r"|(?:answer|option|choice|one|letter|statement) (?:that|which) [a-z' ]{1,40}"
)
_CHOOSE = _any(
    "i meant | i mean | choose | chose | choosing | pick | picked | select | selected | selecting | go with"
    " | going with | went with | opt for | settle on | conclude | guess | vote for | lean toward"
    " | lean towards | leaning toward"
    " | leaning towards"
)
_POINTS_TO = _any(
    "corresponds to | correspond to | corresponding to | matches | matching | which is | that is | this is"
    " | that's | points to | leads to | gives | indicates | means | aligns with | aligning with | agrees with"
    " | consistent with | in line with | fits | i.e. | i.e., | namely | represented by | favors | favours | supports"
    " | confirms"
)
THE_ANSWER_IS = re.compile(
    WORD_START
    + r"(?i:(?:"
    + _NOUN
    + r")(?: (?:here|choice|option|letter|(?:to|for) (?:this|the) question(?: '[^'\n]{1,200}')?))?(?: ?(?:"
    + _BE
    + r")[:,]?\s?))"
    + FILL
    + LETTER
)
I_CHOOSE = re.compile(WORD_START + r"(?i:(?:" + _CHOOSE + r")[,:]? )" + FILL + LETTER)
POINTS_TO = re.compile(
    WORD_START
    + r"(?i:(?:"
    + _POINTS_TO
    + r") (?:the )?(?:correct )?(?:option|choice|answer|letter) )"
    + LETTER
)
ANSWER_IS_ZH = re.compile(
    r"(?:(?:答案|正确选项|正確選項|正确的是|结论)(?:应该|应当|应|應該|應|就)?(?:是|为|為|选|選) ?(?:选项|選項)? ?"
    r"|(?<!误)答案(?= ?\(?[A-H]))" + LETTER
)
CHOOSE_ZH = re.compile(
    r"(?:对应(?:的是|于)?|即|选择|選擇|选定|选|選)(?:的?是)? ?:? ?(?:选项|選項|答案)? ?" + LETTER
)

_CLAUSE_END = (
    r"(?= ?[)" + BOX_CLOSE + r"]? ?(?:[.,;:!。、\n" + BOX_CLOSE + r"]|$|because|since|to me|for me))"
)
_SO = _any(
    "so | therefore | thus | hence | consequently | it is | it's | it must be | it has to be | it should be"
    " | that's | i think | i believe | i'd say | i would say | would be | must be | has to be | we get | probably"
    " | likely | definitely | maybe | leaving | leaves | only | looks like | seems like | appears to be | but"
    " | should be | actually | in fact | hmm"
    " | all things considered | even so | even then | despite that | despite this | despite it"
    " | regardless | nevertheless"
    " | nonetheless | still | anyway | that said | in any case | in the end | all the same"
    " | be that as it may | having said that | by elimination"
    " | but rather | but it's | but still | yet still | no | yes | ok | okay | sure | certainly"
)
SO = re.compile(
    r"(?:"
    + WORD_START
    + r"(?i:"
    + _SO
    + r")[,:]? |(?:=>|->|→|⇒) ?|(?:所以|因此|故|应该|就|觉得|认为|而|^(?=是))(?:是|为)? ?)"
    + FILL
    + LETTER
    + _CLAUSE_END
)
# "Although it looks green here, B."
CONCEDED = re.compile(
    r"(?:"
    + WORD_START
    + r"(?i:despite|in spite of|although|though|even though|even if|notwithstanding|regardless of|while"
    + r"|if i (?:had|have|must|am|were)|if you ask|if forced)(?![a-z]) [^.,;:!?\n]{1,100}(?:,|:) "
    + r"|(?i: notwithstanding, ))"
    + FILL
    + LETTER
    + r"(?= ?[)]?[.!]?(?:\n|$))"
)
_EMPHASIS = _any(
    "the | most | clearly | definitely | indeed | probably | likely | therefore | thus | obviously | my | only"
    " | final | best | correct | right"
)
_SIDE = "next|above|below|beside|behind|in|of|on|at|under|side|hand"  # "A is right next to the tree"
IS_CORRECT = re.compile(
    r"(?<![A-Za-z0-9'._-])(?i:(?:option|choice) )?\(?([A-Za-z])\)?(?:(?i: (?:is|seems|looks|appears"
    r"|would be|must be"
    r"|has to be|should be)(?: to be)?(?: (?:"
    + _EMPHASIS
    + r")){0,4} (?:correct|right|best|true|answer|choice|guess|pick|accurate|match|more likely"
    r"|most likely)(?! (?:"
    + _SIDE
    + r")))(?![a-z])"
    + r"|(?i: is the (?:one|option|choice) that (?:best )?(?:fits|matches|is correct|is right"
    r"|applies))(?![a-z])"
    + r"|(?i: it is)(?![a-z ])|(?i: the (?:most )?(?:correct|right|best|accurate|likely|suitable"
    r"|appropriate|fitting)"
    + r" (?:answer|choice|option|one|pick|match|description))"
    + r"|(?i: best (?:fits|matches|describes|represents|corresponds|reflects|answers)(?![a-z]))"
    + r"|(?i: (?:fits|matches|describes \w{1,20} \w{1,20}) best(?![a-z]))"
    + r"|(?:选项|選項|项|項)?(?:是)?(?:正确|正確|对的|對的|最?(?:符合|吻合|匹配|合适|合適)))"
)

OPENING = re.compile(
    r"(?i:(?:option|choice|选项|選項) ?)?\(?([A-Za-z])"
    + NO_WORD_AFTER
    + r"(?: ?\)|(?= ?[.,:;!?、。/]| [-–—] |\n|$|吧| or | and | because | since | rather than | \(not ))"
)
CLOSING_SENTENCE = re.compile(r"[.!?。] ?\(?([A-Z])\)?[.!。]?$")
_SIGNS = r"[^\w\n(?+#&@%]{0,4}"
BARE_LINE = re.compile(
    "^" + _SIGNS + r"(?i:(?:the )?(?:option|choice|letter|选项|選項|so|therefore|选|選) ?[:,]? ?)?"
    r"\(?([A-Za-z])[)\]]?" + _SIGNS + "$",
    re.M,
)
LABELLED = re.compile(r"(?<![A-Za-z0-9'._-])\(?([A-Z])(?:\)|[.:](?=[ \n]|[^\W\d_]{2})) ?(?=[^\n])")
WITH_TEXT = re.compile(r"(?<![A-Za-z0-9'._-])\(?([A-Z])\)?(?: ?[,:(=-] ?| ?[–—] ?|\. | )(?=[^\n])")
# A sentence that gives an option's text as what something is or reads; its first group is the subject.
PREDICATE = re.compile(
    r"([^.,;:!?\n。，]{1,120}?)(?: (?:is|are|was|were|appears to be|seems to be|says|say|reads|read"
    r"|shows|show|displays):? |(?:是|为|為|写着|显示为?))"
)
NO_SUBJECT = re.compile(
    r"(?<![a-z])(?:option|choice|answer|might|may|could|maybe|perhaps|possibly|what|which|who|how"
    r"|only|no|none|nothing|like|either)(?![a-z])|(?<![A-Za-z])[A-H]$|选项|答案|可能|也许|什么|哪",
    re.I,
)
# A letter at the very end after a colon, dash or arrow.
CLOSING_LETTER = re.compile(r"(?::| [-–—=]|→|->|：) ?\(?([A-Z])\)?[.!。]?$")
CONCLUDES = re.compile(
    r"(?i:consider|conclu|analys|reason|inspect|correct|best|answer|guess|overall|letter|since|must)|综上"
    r"|结论|答案"
)
# What may stand before a letter that has its own text beside it; "Row C: green" is no answer.
INTRODUCES = re.compile(
    r"(?:^|[\n:(→。：，] ?|(?<![A-Za-z])(?i:is|be|with|matches|match|fits|to|as|option|choice|answer"
    r"|namely|for|or"
    r"|so|therefore|select|choose|pick|it's) ?|[选選是为為] ?)$"
)
SUPPOSED = re.compile(
    r"(?<![a-z])(?:might|may|could|maybe|perhaps|possibly|either|if|unless|suppose|assuming|whether|what"
    r"|unclear|unknown|unsure)(?![a-z])|可能|也许|如果|是否",
    re.I,
)
STANDALONE = re.compile(r"(?<![A-Za-z0-9'._&-])\(?([A-H])" + NO_WORD_AFTER)
JUDGED = re.compile(
    r"^(?:(?i:option|choice|选项) ?)?\(?([A-Z])[).:：]?[^\n]{0,200}?(?<![A-Za-z])"
    r"(?i:(correct|right|true|yes|正确|符合)|(incorrect|not correct|wrong|false|no|不正确|错误|不符合))[^\w\n?]{0,3}$",
    re.M,
)
# Labels in small letters, where the options carry such: "(a)" and "a)".
LOWER_LABEL = re.compile(r"(?<![A-Za-z0-9'])(?:\([a-h]\)|(?<!\()[a-h](?=\)))")
# "A (a)", "Option D, (d)", "C, i.e. (C)"
SAID_TWICE = re.compile(
    r"(?<![A-Za-z0-9'._-])\(?([A-Za-z])\)?[,.:]? ?(?i:i\.e\.,? |that is,? |namely,? |meaning |= ?|aka )?"
    r"\((?i:(?:option|choice|letter|answer) )?(?i:\1)\)"
)
BRACKETED = re.compile(r"(?<![A-Za-z0-9])\(([A-Z])\)")

# After "A", a lower-case word other than these makes it the article.
_NOT_A_NOUN = _any(
    "because | since | is | as | which | for | and | or | based | the | this | that | due | if | with | was | would"
    " | porque | parce | puisque | car | weil | denn | da | ya | pues | según | ist | est | es | wenn | falls | si"
    " | it | there | given | seems | looks | so | but | not | in | on | according | are | will | should | has | i"
    " | to | where | while | rather | instead | fits | matches | over | from | by | at | than | after"
)
ARTICLE_TAIL = re.compile(r" (?!(?:" + _NOT_A_NOUN + r")(?![a-z]))[a-z]")
LOWER_TAIL = re.compile(r" ?(?:[.,;:!?)}\n。" + BOX_CLOSE + r"]|$|because |since |is )")
CLOSING = re.compile(r" ?[)" + BOX_CLOSE + r"]")
# "The answer is A; B is green": the second letter opens a new clause.
_VERB = _any(
    "is | was | shows | has | looks | appears | seems | does | contains | describes | refers | would | can"
)
OTHER_LETTER = re.compile(
    r"[.]?\s?(?:\?(?= (?:or|Or) )|[,;:](?! ?\(?[A-Z]\)? (?:"
    + _VERB
    + r")(?![a-z]))|[/&?、]|或者?|也可能是?|还是|還是|和|与|與|"
    + WORD_START
    + r"(?:or|and|vs\.?|ou|oder|und|et|y|o|e|u)(?![a-z])(?:, [a-z' ]{1,40},)?|이?나(?= )|[와과]|또는|혹은"
    + r"|または|もしくは|か(?=[A-Z ])|と|や"
    r"|\((?=or |and ))\s?"
    r"(?:(?:or|Or|and|maybe|possibly|perhaps|probably|option|choice|even|also|both|else) ){0,3}[选選]?"
    r"\(?([A-Z])(?![A-Za-z0-9'])"
)
_WRONG = _any(
    "incorrect | wrong | the wrong | a wrong | an error | a mistake | mistaken | in error"
    " | false | impossible | excluded | eliminated | ruled out | unlikely"
)
DENIED_AFTER = re.compile(
    r" (?:option )?(?:(?:is|was|are|seems|looks|would be|must be|can be|could be)"
    r"(?:n't| not| clearly| definitely| also)? )?(?:"
    + _WRONG
    + r"|not(?! \(?[A-Z](?![A-Za-z])))(?![a-z])"
    + r"|(?:,? [a-z]{1,12}){0,2} (?:are|is) (?:wrong|incorrect|not)(?![a-z])"
    + r"| (?:isn't|wasn't|can't|cannot|doesn't|can not|does not)(?![a-z])| ?是?(?:错|錯|不|排除)"
    + r"| (?:ist|est|es|é|è)?n? ?(?:nicht|pas|falsch|faux|fausse|incorrecte?|incorrecta|falsa)(?![a-z])"
    + r"| ?번?(?:이|가|은|는|도)? ?(?:아[니닌닙]|오답)|で?は?(?:なく|な[いか]|ありません)|じゃな"
    + r"| ?번?일 ?(?:수도|지도)|かも|でしょうか|ですか|인가요|일까"
)
CLAUSE_BREAK = re.compile(
    r"[.,;:!?\n。、—]|(?<![a-z])(?:but|so|therefore|thus|hence|and|because)(?![a-z])", re.I
)
_DENIAL = _any(
    "not | never | cannot | neither | nor | doubt | unlikely | unless | if | whether | suppose | assuming | wrong"
    " | incorrect | eliminate | eliminated | eliminating | ruling out | discard | discarding | discarded | rejected"
    " | mistaken | mistake | error | wrongly | regret | dismiss | dismissed | discount | worst | avoid"
    " | excluding | might | may | could | ruled out | rule out | excluded | exclude | least"
    " | false | rather than | instead of | except | without | would have been"
)
# "Which one is wrong? A."
WRONG_ASKED = re.compile(
    r"(?:n't [a-z]{1,15}|(?<![a-z])(?:wrong|incorrect|false|not [a-z]{1,15}|excluded?|eliminated?"
    r"|rejected?|worst|least likely))"
    r"[^.?!\n]{0,30}\?[ \n]\(?$",
    re.I,
)
DENIED_BEFORE = re.compile(
    r"(?<![a-z])(?:" + _DENIAL + r")(?![a-z])|n't|不|非|没|沒|别|別|除|错误|若|如果|是否|排除", re.I
)
