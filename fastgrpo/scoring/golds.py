"""Gold answers and options as data sets write them, read as texts."""

import math
import re
from typing import Any

from fastgrpo.scoring.answers import letter_index, parse_answer
from fastgrpo.types import RowError

_LAST_LINE = re.compile(r"(?:^|\n)#### *(\S.*?)\s*\Z")  # GSM8K: the answer behind the worked solution
_BOX = r"\boxed{"


def gold_text(value: Any, column: str = "solution") -> str:
    """The answer that a row's gold value stands for.

    A number becomes its digits, a boolean "true" or "false", a list of one its element. Of a text counts what stands
    in its `<answer>` tags, in its last `\\boxed{}` or behind `####`, if there is any of these, else all of it.

    Raises:
        RowError: a value that no answer can match: blank, not finite, several values, a record.
    """
    given = value
    value = _plain(value)
    if isinstance(value, list) and len(value) == 1:
        value = _plain(value[0])
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if not isinstance(value, str):
        raise RowError(f"{column} is {given!r}; wanted one text or number")
    text = _answer_part(value)
    if text is None or not text.strip():
        raise RowError(f"{column} is {given!r}; wanted one answer in it")
    return text.strip()


def option_texts(values: Any, column: str = "choices") -> list[str]:
    """The options that a row offers, (A) first.

    Raises:
        RowError: no list, or an element that is neither a text nor a number.
    """
    values = _plain(values)
    if not isinstance(values, list | tuple):
        raise RowError(f"{column} is {values!r}; wanted a list of options")
    options = [str(value).strip() if isinstance(value, str | int | float) else "" for value in map(_plain, values)]
    if not all(options):
        raise RowError(f"{column} is {values!r}; wanted a text or a number for each option")
    return options


def check_gold(solution: Any, choices: Any = None) -> None:
    """Raises a RowError for a `solution`, with or without `choices`, that no answer can match. None is no gold."""
    options = None if choices is None else option_texts(choices)
    if solution is None:
        return
    gold = gold_text(solution)
    if options and (index := letter_index(gold)) is not None and index >= len(options) and gold not in options:
        raise RowError(f"solution {gold!r} is not a letter of the {len(options)} choices")


def _plain(value: Any) -> Any:
    """The Python value of a numpy or torch one."""
    return value.tolist() if hasattr(value, "tolist") else value


def _answer_part(text: str) -> str | None:
    """What of a gold text is the answer; None where tags around it cannot be read."""
    if "<answer>" in text or "</answer>" in text:
        return parse_answer(text)
    if found := _LAST_LINE.search(text):
        return found[1]
    if text.count(_BOX) and (inside := _last_box(text)) is not None:
        return inside
    return text


def _last_box(text: str) -> str | None:
    start = text.rindex(_BOX) + len(_BOX)
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None
