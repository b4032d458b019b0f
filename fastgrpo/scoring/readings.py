"""Evaluation's grader: reads the option that a free-text answer settles on.

Models that were not trained on answer tags say "(B) no", "Yes, the cat is …" or "so the correct option is B". A person
reads an option there, and so does `read_option`. It is for evaluation alone: the reward stays with the strict grader of
`answers.py`, which a policy cannot please with an answer that is half there.

First the text is tidied: special tokens (`</s>`, `<|im_end|>`) and emphasis go, full-width and Chinese punctuation
becomes plain, what follows `</think>` is the answer, and a further question that a base model went on to write is cut
off. Where a text takes itself back ("Wait, …", "Actually, …") its last turn that names an option is read. Options that
are only restated ("(A) yes (B) no", "left or right", a list with a remark on each) are masked.

An answer that the strict grader takes for an option is that option. Else the rules of `RULES` are tried in order. The
first that finds an option decides; where it finds two different ones, one that was not offered, or "neither" or "both",
there is no readable answer. Nothing is guessed, and nothing is concluded from an option that is ruled out.
"""

import re
import string
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from fastgrpo.scoring.answers import NUMBER_WORDS, answers_match, parse_answer, plain_character

_SPECIAL = re.compile(
    r"</?s>|<\|[^<>|\n]{1,40}\|>|<(?:pad|unk|bos|eos|end_of_turn|start_of_turn|end_of_utterance)>|\[/?INST\]"
)
_PUNCTUATION = str.maketrans(
    {"。": ". ", "、": ", ", "，": ", ", "：": ": ", "；": "; ", "！": "! ", "？": "? ", "’": "'", "“": '"', "”": '"'}
)
_LATEX = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
_QUOTED_LETTER = re.compile(r"(?<![\w\"'])([\"'])([A-Z])\1(?!\w)")
_EMPHASIS = re.compile(r"[*`$]|__|(?m:^[ \t]*(?:#{1,6}|>|[-•])[ \t]+)")
_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_NEXT_QUESTION = re.compile(r"(?<=\S)\s*\n\s*(?:#+ *)?(?:question|user|human|instruction|q)\b *\d* *:", re.IGNORECASE)
_SECOND_THOUGHT = re.compile(
    r"(?:\A|(?<=[.!?\n]))\s*(?:(?:but|no|oh|hmm+),? )?(?:wait|hold on|actually|on second thoughts?|correction|oops|"
    r"let me (?:re-?check|reconsider|correct))\b",
    re.IGNORECASE,
)

# Where a text names an option, one private character stands for it, so that the rules are short: a letter with its
# text; a letter that can be nothing else; a lone capital, perhaps an article or the name of a point; a text alone.
_FIRST = {"both": 0xE000, "letter": 0xE020, "capital": 0xE040, "text": 0xE060}
_BOTH, _ALONE, _CAPITAL, _TEXT = (f"[{chr(first)}-{chr(first + 25)}]" for first in _FIRST.values())
_LETTER = "[\ue000-\ue039]"
_NOT_OFFERED = "\ue080"
_MARK = "[\ue000-\ue080]"
_MASK = "…"
_MOST_EXACT = 400
"""Characters of an answer that is still compared as a whole."""
_POLAR = {"yes", "no", "none", "one", "a", "i"}
"""Texts of options that prose is full of: they count where they end a phrase, or open one as "yes it is" does."""

_END = r"(?=\s*(?:[.,:;!?)}\"\]…\n\u4e00-\u9fff]|'(?!\w)|-\s|\([A-Za-z]\)|(?:because|since)\b|\Z))"
_ARTICLE = re.compile(r"(?:the|an?) (?!(?:is|are|was|were|has|and|or)\b)")  # "A is closer" starts with a name
_IS = r"(?:\1|appears?|seems?|looks?)(?: to be)?(?: (?!hard|bare|equal|unlike)(?:\\w+ly|indeed|much|the)){0,2}"
_NEITHER = r"(?:neither|both|none|all of|unclear|unknown|cannot|not (?:possible|clear|certain))\b"
_GOOD = r"(?:final|correct|right|best|likely|appropriate|accurate|suitable)"
_SUBJECT = r"(?:answer|option|choice|verdict|conclusion)"
_ANSWER_IS = (
    rf"\b{_SUBJECT}\b[\"']?(?:[^.:;=?!\n{_MARK[1:-1]}]{{0,60}}?\b(?:is|be|was)\b)?"
    rf"[ ,]*[:=-]?\s*(?:that |the |{_SUBJECT} )*"
)
_NOUN = r"(?:(?:point|circle|image|picture|object|region|letter) )?"
"""Of what options may be the names."""
_SO = r"\b(?:so|therefore|thus|hence|consequently|overall|in conclusion|in summary)\b"
_LEAD_IN = "|".join(
    [
        _ANSWER_IS,
        r"\b(?:i|we)(?:'d|'ll| would| will| must)? (?:choose|select|pick|say|answer|opt for|go with) (?:that |the )?",
        r"(?:答案|正确选项)(?:应该|应)?(?:是|为|选)?[ :]*|选(?:择|项)?[ :]*",
    ]
)
_REJECTED = r"(?<!wrong )(?<!incorrect )(?<!not the )(?<!not the correct )(?<!if the )(?<!if the correct )"
_ANNOUNCED = re.compile(
    rf"{_REJECTED}(?:(?:{_LEAD_IN}){_NOUN}[\"'(\[]*(?P<option>{_MARK})|{_ANSWER_IS}[\"'(\[]*{_NEITHER})"
    rf"|(?:\A|(?<=[.!?:\n]))\s*{_SO},? (?:it(?:'s| is) )?[\"'(\[]*(?P<letter>{_LETTER}|{_CAPITAL})",
    re.IGNORECASE,
)
_FINAL = re.compile(rf"\bfinal {_SUBJECT}(?: is)?[ :]*\s*[\"'(\[]*(?:({_MARK})|{_NEITHER})", re.IGNORECASE)
_CALLED_CORRECT = re.compile(
    rf"({_LETTER})[^.\n]{{0,80}}?\s(?:is|would be|seems|seems to be|appears to be) (?:the )?(?:most )?"
    rf"(?:correct|{_GOOD} {_SUBJECT})\b",
    re.IGNORECASE,
)
_OPENING = re.compile(
    rf"\A[\s\"'(\[{_MASK}]*(?:(?:sure|certainly|of course|ok|okay)[,!.] *)?"
    r"(?:(?:i think|i believe|it's|it is|the)\b *)*"
    rf"(?:({_LETTER}|{_NOT_OFFERED})|({_CAPITAL}|{_TEXT}){_END}|({_TEXT}) (?:the|it|there|they|this|that|he|she)\b)",
    re.IGNORECASE,
)
_LONE_LINE = re.compile(rf"^[\s\"'(\[]*{_NOUN}({_MARK})[\s.!\"')\]]*$", re.MULTILINE | re.IGNORECASE)
_CONCLUDING = re.compile(_SO, re.IGNORECASE)
_DENIED = re.compile(
    r"(?:\b(?:not|neither|nor|never|no|cannot|without|rather than|instead of|than|or|whether|which|if|between)|n't)"
    r"(?:\s+[\w']+){0,3}[\s\"'(]*\Z",
    re.IGNORECASE,
)


class Rule(NamedTuple):
    """`find` gives marks of options, or "" for an answer that is none of them."""

    name: str
    says: str
    find: Callable[[str], Iterable[str]]


def _stated(text: str) -> list[str]:
    announced = [match["option"] or match["letter"] or "" for match in _ANNOUNCED.finditer(text)]
    named = [match[1] for pattern in (_CALLED_CORRECT, _LONE_LINE) for match in pattern.finditer(text)]
    opening = _OPENING.match(text)
    return announced + named + ([opening[opening.lastindex or 0]] if opening else [])


def _concluded(text: str) -> list[str]:
    sentences = [s for s in re.split(r"(?<=[.!?])\s+|\n+", text) if _CONCLUDING.search(s)]
    return next(filter(None, map(_mentioned, reversed(sentences))), [])


def _mentioned(text: str) -> list[str]:
    places = re.finditer(f"{_LETTER}|{_TEXT}", text)
    return [place[0] for place in places if not _DENIED.search(text[max(0, place.start() - 60) : place.start()])]


RULES = (
    Rule("final", "what is called the final answer", lambda text: [match[1] or "" for match in _FINAL.finditer(text)]),
    Rule(
        "stated",
        "an option at the head, alone on a line, behind `answer is` and its like, or called the correct one",
        _stated,
    ),
    Rule("concluded", "the option that the last sentence with `therefore` or its like names", _concluded),
    Rule("mentioned", "the one option that the text names at all, by its text or its bracketed letter", _mentioned),
)
"""In order. They are tried on what stands in `<answer>` tags where there are any, else in `\\boxed{}`, else on all."""


def read_option(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that `text` settles on; None where none can be read or two contradict.

    Args:
        text: a model's whole answer.
        choices: the options' texts in order, (A) first; those behind the 26th are never read.
    """
    if (exact := _exact(parse_answer(text) or text, choices)) is not None:
        return exact
    marks = _Marks.of(tuple(choices))
    for turn in _turns(_tidied(text)):
        marked = marks.mark(turn)
        for rule in RULES:
            if found := {_letter(mark) for mark in rule.find(marked)}:
                return found.pop() if len(found) == 1 else None
    return None


def _exact(answer: str, choices: Sequence[str]) -> str | None:
    letters = string.ascii_uppercase[: len(choices)] if len(answer) <= _MOST_EXACT else ""
    return next((letter for letter in letters if answers_match(answer, f"({letter})", choices)), None)


def _letter(mark: str) -> str | None:
    if mark in ("", _NOT_OFFERED):
        return None
    return string.ascii_uppercase[(ord(mark) - _FIRST["both"]) % 0x20]


def _tidied(text: str) -> str:
    text = "".join(map(plain_character, _SPECIAL.sub(" ", text.translate(_PUNCTUATION))))
    text = _QUOTED_LETTER.sub(r"\2", _EMPHASIS.sub("", _LATEX.sub(r"\1", text)))
    before, closed, behind = text.rpartition("</think>")
    text = (behind if behind.strip() else before) if closed else text
    for part in (_TAGGED, _BOXED):
        if inside := part.findall(text):
            return "\n\n".join(one.strip() for one in inside)
    cut = _NEXT_QUESTION.search(text)
    return (text[: cut.start()] if cut else text).strip()


def _turns(text: str) -> list[str]:
    """The text from each place where it takes itself back, the last first."""
    starts = [0, *(match.end() for match in _SECOND_THOUGHT.finditer(text))]
    return [text[start:end].strip(" ,:\n") for start, end in zip(starts, [*starts[1:], len(text)], strict=True)][::-1]


_Put = str | Callable[[re.Match[str]], str]


class _Marks:
    """Puts one character for every mention of an option."""

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(choices: tuple[str, ...]) -> "_Marks":
        return _Marks(choices)

    def __init__(self, choices: Sequence[str]) -> None:
        texts = dict(zip(string.ascii_uppercase, map(_plain, choices), strict=False))
        offered = "".join(texts)
        self.steps: list[tuple[re.Pattern[str], _Put]] = []
        polar = "|".join(re.escape(text) for text in texts.values() if text in _POLAR)
        if polar:
            self._add(rf"\b(?:{polar})\s*(?:/|\||or|and)\s*(?:{polar})\b", _MASK)
        letter = (
            r"(?:(?:option|choice|letter)\s+)?(?:[(\[{{<]\s*{0}\s*[)\]}}>]|\b{0}\b(?=[).:,]|\s|\s*-))"
            r"[).:,]?\s*(?:-\s)?[\"']?"
        )
        for name, text in texts.items():
            self._add(letter.format(name) + _pattern(text, anywhere=True) + r"[\"']?", _mark("both", name))
            self._add(_pattern(text, anywhere=True) + rf"[\"']? ?[(\[]{name}[)\]]", _mark("both", name))
        for name, text in sorted(texts.items(), key=lambda item: -len(item[1])):
            self._add(_pattern(text, anywhere=False), _mark("text", name))
        named = r"(?i:\b(?:option|choice|letter)\s+)"
        self._add(
            rf"(?:{named})?[(\[{{<]\s*([A-Z{offered.lower()}])\s*[)\]}}>]|{named}([A-Z])\b(?!')",
            lambda m: self._lettered(m[1] or m[2], texts),
            re.NOFLAG,
        )
        self._add(rf"(?<![A-Za-z0-9_'.])([A-Z]){_END}", lambda m: self._lettered(m[1], texts, "capital"), re.NOFLAG)
        self._add(
            rf"(?m:^)\s*([{offered.lower()}])(?=[).:]\s|[).:]?\s*$)|(?<=[:s] )([b-z])(?=[.)]?\s*\Z)",
            lambda m: self._lettered(m[1] or m[2], texts),
            re.MULTILINE,
        )
        contradiction = rf"(?:{_ALONE}|{_CAPITAL})[ ).:,]*(?:- )?[\"']?{_TEXT}|{_TEXT}[\"']? ?{_ALONE}"
        self._add(contradiction, _NOT_OFFERED)
        self._add(rf"{_MARK}(?=\s*(?:is|are|was)(?:n't| not| incorrect| wrong| false)\b)", _MASK)

    def _add(self, pattern: str, put: _Put, flags: re.RegexFlag = re.IGNORECASE) -> None:
        self.steps.append((re.compile(pattern, flags), put))

    @staticmethod
    def _lettered(letter: str, texts: dict[str, str], kind: str = "letter") -> str:
        return _mark(kind, letter.upper()) if letter.upper() in texts else _NOT_OFFERED

    def mark(self, text: str) -> str:
        """The text with a character for every option that it names, and a mask for options that it only restates."""
        for pattern, put in self.steps:
            text = pattern.sub(put, text)
        text = _RUN.sub(lambda run: _mask_first(run[0]), text)
        heads = _LINE_HEAD.findall(text)
        return _mask_first(text, _LINE_HEAD) if len(set(map(_letter, heads))) > 1 else text


_RUN = re.compile(rf"{_MARK}(?:[\s,;/|\"']*(?:\b(?:or|and|vs\.?)\b)?[\s\"']*{_MARK}|\.\s*{_LETTER})+", re.IGNORECASE)
_LINE_HEAD = re.compile(rf"^[\s\"']*({_LETTER}|{_CAPITAL})", re.MULTILINE)


def _mark(kind: str, letter: str) -> str:
    return chr(_FIRST[kind] + string.ascii_uppercase.index(letter))


def _mask_first(text: str, pattern: re.Pattern[str] = re.compile(f"({_MARK})")) -> str:
    """Masks a list of options: all but one that alone is named again behind it."""
    seen: set[str | None] = set()
    again: list[re.Match[str]] = []
    for match in pattern.finditer(text):
        letter = _letter(match[1])
        again += [match] if letter in seen else []
        seen.add(letter)
    if len(seen) < 2:
        return text
    kept = {match.start() for match in again} if len({_letter(match[1]) for match in again}) == 1 else set()
    return pattern.sub(lambda match: match[0] if match.start() in kept else _MASK, text)


def _plain(choice: str) -> str:
    return " ".join(choice.translate(_PUNCTUATION).casefold().split()).strip(" .,;:!?\"'")


def _pattern(text: str, *, anywhere: bool) -> str:
    """An option's text: with or without its article, a number as a word as well, "appears" for "is".

    Args:
        anywhere: behind its letter; else what prose is full of must end a phrase, and "1." must not count points.
    """
    article = _ARTICLE.match(text)
    forms = re.escape(text[article.end() :] if article else text)
    forms = re.sub(r"\b(is|are)\b", _IS, forms)
    subject, is_, predicate = text.partition(" is ")
    if is_ and len(subject) == 1:  # "the one closer to the camera is A"
        forms += (
            rf"|{re.escape(predicate)}(?: [\w']+){{0,4}} (?:is|would be)(?: the)? {_NOUN}{re.escape(subject)}(?!\w)"
        )
        forms = f"(?:{forms})"
    if text.isdigit() and int(text) < len(NUMBER_WORDS):
        forms = f"(?:{text}|{NUMBER_WORDS[int(text)]})"
    if article or text.isdigit():
        forms = f"(?:(?:the|an?) )?{forms}"
    if anywhere:
        return rf"{forms}(?!\w|[.,]\d)"
    if text in _POLAR:
        return rf"(?<![\w-]){forms}(?:{_END}|(?= (?:the|it|there|they|this|that|he|she)\b))"
    counting = r"(?!(?m:^)\d+[.)][ \t]+\S)" if text.isdigit() else ""
    return rf"(?<![\w.-]){counting}{forms}(?!\w|[.,]\d|-\w)"
