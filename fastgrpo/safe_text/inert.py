"""Text of models, data sets and users where something might act on it."""

import re

_ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and newline, marks that turn the direction of writing, and halves of surrogate pairs."""


def inert(text: str) -> str:
    """The text with every character that a terminal would act on, or cannot encode, spelt out: `\\x1b`, `\\ud800`."""
    return _ACTS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
