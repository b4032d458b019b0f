"""A data set's row in one form for all schemas: pictures, a question or a conversation, and columns for rewards."""

import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from fastgrpo.scoring.answers import letter_index
from fastgrpo.scoring.golds import option_texts
from fastgrpo.types import RowError


@dataclass(frozen=True)
class Row:
    """One row of any schema. Exactly one of `question` and `messages` is set."""

    row_id: int
    """Index of the row in its data set."""
    images: list[Image.Image] = field(default_factory=list)
    """Decoded RGB pictures, in the order of their places in the prompt; empty for a text-only row."""
    question: str | None = None
    """A bare question, still to be put into the prompt of the run's mode."""
    messages: list[dict[str, Any]] | str | None = None
    """A conversation for the model's chat template, or a finished prompt (str) taken as it is."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Passed to reward functions by name: `solution`, `choices`, `task`, and the row's other columns."""


def require_text(raw: dict[str, Any], column: str) -> str:
    """The column's text stripped.

    Raises:
        RowError: the value is no string, or blank.
    """
    value = raw.get(column)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{column} is {value!r}; wanted a text")
    return value.strip()


def require_options(raw: dict[str, Any], column: str) -> list[str]:
    """The column's options as texts, in order, stripped.

    Raises:
        RowError: fewer than two options, or one that is blank or neither a text nor a number.
    """
    options = [] if raw.get(column) is None else option_texts(raw[column], column)
    if len(options) < 2:
        raise RowError(f"{column} holds {len(options)} options; wanted at least two")
    return options


def require_letter(raw: dict[str, Any], column: str, choices: Sequence[str]) -> str:
    """The option that the column names by its letter, in any usual form, as "(A)".

    Raises:
        RowError: the value is no letter of one of the choices.
    """
    answer = require_text(raw, column)
    index = letter_index(answer)
    if index is None or index >= len(choices):
        raise RowError(f"{column} {answer!r} is not a letter of the {len(choices)} choices")
    return f"({string.ascii_uppercase[index]})"
