"""Reads the answer out of a completion and compares it with the gold one.

An answer counts when it names the gold option or value and nothing else: option letters in any usual form, option
texts without regard to case, white space, quotes, end punctuation or a leading article, numbers by value. "The answer
is" and its like may stand in front. Any other sentence around the answer ("it is on the left") earns nothing, so an
article "a" is never taken for option A.
"""

import functools
import logging
import re
import string
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

try:
    import math_verify
except ImportError:  # answers written in LaTeX are then equal only where their texts are: `_same_number` says so once
    math_verify = None

logger = logging.getLogger(__name__)

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_MAX_NUMBER_CHARS = 40  # a completion must not choose how long a comparison takes

# math-verify warns that its own timeouts are off. They need the main thread; bounded input needs none.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-"})
_WRAPPERS = "\"'`*_$ "
_END_MARKS = ".,;:!?。"
_LATEX_WRAPPER = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)\{(.*)\}|\\\((.*)\\\)|\\\[(.*)\\\]")
_ARTICLE = re.compile(r"\A(?:the|an?) (?=\w\w|\d)")  # "a b" is not option B
_NAMED = r"(?:(?:option|choice|answer)\b:? ?)?"
_LEAD_IN = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:(?:the|my) )?(?:(?:final|correct|right|best) )?(?:answer|option|choice)"
    r"(?: is:?| ?:| ?=) ?(?=\S)"
)
_LETTER = re.compile(_NAMED + r"[(\[{<]?([a-z])[)\]}>]?[.:]?")
_LETTER_AND_TEXT = re.compile(_NAMED + r"(?:[(\[{<]([a-z])[)\]}>]|([a-z])(?=[).:,] | - ))[).:,]?(?: ?-(?= ))? ?(.+)")
_TEXT_AND_LETTER = re.compile(r"(.+?) ?[(\[]([a-z])[)\]]")
_NUMBER = re.compile(r"([+-]?)([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)?(\.[0-9]*)?")
_FRACTION = re.compile(r"([+-]?[0-9]+) ?/ ?([0-9]+)")
NUMBER_WORDS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
]
# What math-verify may see: digits, + − × / and these commands, at most one power and that of one digit. Large powers
# and factorials would let a few characters compute for hours.
_POWER = r"\^(?:[0-9]|\{-?[0-9]\})(?=[-+*/)}]|\\cdot|\\times|$)"
_LATEX = re.compile(r"(?:[-+*/().{} 0-9%]|\\(?:[dt]?frac|sqrt|pi|cdot|times|left|right|%)|" + _POWER + ")+")


def parse_answer(text: str) -> str | None:
    """The content of the text's one `<answer>…</answer>` block, stripped.

    None if there is no such block, more than one, another tag without its partner, or nothing inside.
    """
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    found = _ANSWER.search(text)
    return (found[1].strip() or None) if found else None


def answers_match(answer: str, solution: str, choices: Sequence[str] | None = None) -> bool:
    """Whether an answer, taken as a whole, is the gold one.

    Args:
        answer: what a model answered: an option's letter, its text, both, or a number.
        solution: the gold answer, in any of these forms.
        choices: the options' texts in order, (A) first; without them a letter only equals the same letter.
    """
    options = [normalise(choice) for choice in choices or ()]
    given, gold = _resolve(_read(answer), options), _resolve(_read(solution), options)
    return given != "" and (given == gold or _same_number(given, gold))


def normalise(text: str) -> str:
    """The text without differences of case, white space, quotes, emphasis, end punctuation or a leading article."""
    if not text.isascii():
        text = "".join(map(plain_character, text)).translate(_QUOTES)
    text = " ".join(text.split()).casefold()
    before = None
    while text != before:
        before = text
        text = text.strip(_WRAPPERS).rstrip(_END_MARKS)
        if wrapped := _LATEX_WRAPPER.fullmatch(text):
            text = next(group for group in wrapped.groups() if group is not None)
    return _ARTICLE.sub("", text)


def plain_character(character: str) -> str:
    """The plain form of a full-width or styled character. Superscripts and fractions stay: 3² is not 32."""
    kind = unicodedata.decomposition(character).split(" ")[0]
    return character if kind in ("<super>", "<sub>", "<fraction>") else unicodedata.normalize("NFKC", character)


def _read(answer: str) -> str:
    """The answer normalised, without a lead-in."""
    text = normalise(answer)
    lead_in = _LEAD_IN.match(text)
    if lead_in is None:
        return text
    rest = normalise(text[lead_in.end() :])
    # A text that was cut behind "the answer is a" ends in an article.
    return "" if rest == "a" and _last_letter(answer) != "A" else rest


def _last_letter(text: str) -> str:
    return next((plain_character(character) for character in reversed(text) if character.isalnum()), "")


def letter_index(text: str) -> int | None:
    """The place of the option that a text names by its letter alone, (A) first; None where it names none."""
    letter = _LETTER.fullmatch(normalise(text))
    return None if letter is None else string.ascii_lowercase.index(letter[1])


def _resolve(text: str, options: list[str]) -> str:
    """The option's text where one is named by letter, the letter as "(a)" where no options are known."""
    if text in options:
        return text
    if letter := _LETTER.fullmatch(text):
        index = string.ascii_lowercase.index(letter[1])
        return options[index] if index < len(options) else f"({letter[1]})"
    if both := _LETTER_AND_TEXT.fullmatch(text):
        bracketed, bare, rest = both.groups()
    elif both := _TEXT_AND_LETTER.fullmatch(text):
        rest, bracketed = both.groups()
    else:
        return text
    option = _resolve(bracketed or bare, options)
    if options:
        return option if normalise(rest) == option or _same_number(normalise(rest), option) else text
    return option if bracketed and both.re is _LETTER_AND_TEXT else text


def _same_number(first: str, second: str) -> bool:
    if max(len(first), len(second)) > _MAX_NUMBER_CHARS:
        return False
    values = _value(first), _value(second)
    if None not in values:
        return values[0] == values[1]
    if not (_is_latex(first) and _is_latex(second)):
        return False
    if math_verify is None:
        _warn_of_missing_math_verify()
        return False
    given, gold = (math_verify.parse(f"${text}$", parsing_timeout=None) for text in (first, second))
    return bool(math_verify.verify(gold, given, timeout_seconds=None))


@functools.cache
def _warn_of_missing_math_verify() -> None:
    logger.warning(
        "math-verify is not installed: answers in LaTeX count only as the same text. pip install math-verify"
    )


def _value(text: str) -> Fraction | None:
    """The number that a text is: "3", "-0.5", "1,000", "1/2", "50%", "three" (to twenty)."""
    if text in NUMBER_WORDS:
        return Fraction(NUMBER_WORDS.index(text))
    if fraction := _FRACTION.fullmatch(text):
        return Fraction(int(fraction[1]), int(fraction[2])) if int(fraction[2]) else None
    number = _NUMBER.fullmatch(text.removesuffix("%").rstrip())
    if number is None or not any(character.isdigit() for character in text):
        return None
    value = Fraction(f"{number[1]}{(number[2] or '0').replace(',', '')}{(number[3] or '').rstrip('.')}")
    return value / 100 if text.endswith("%") else value


def _is_latex(text: str) -> bool:
    return text.count("^") <= 1 and "**" not in text and text[-1:] not in "+-*/" and _LATEX.fullmatch(text) is not None
