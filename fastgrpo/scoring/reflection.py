"""Phrases in which a model doubts or re-examines its own reasoning (the "aha moment")."""

import re

REFLECTIVE_PHRASES = (
    "wait",
    "hmm",
    "hold on",
    "actually",
    "on second thought",
    "on closer inspection",
    "let me check",
    "let me double-check",
    "let me think again",
    "let me look again",
    "let me look closer",
    "let me look more closely",
    "let me re-examine",
    "let me reconsider",
    "let me rethink",
    "let me try again",
    "let me verify",
    "let's check",
    "let's double-check",
    "let's think again",
    "let's look again",
    "let's look closer",
    "let's re-examine",
    "let's reconsider",
    "let's rethink",
    "let's verify",
    "re-check",
    "re-evaluate",
    "re-examine",
    "reconsider",
    "rethink",
    "double-check",
    "check again",
    "look again",
    "think again",
    "i made a mistake",
    "i was wrong",
    "that's not right",
    "that is not right",
    "that's wrong",
    "however, upon",
    "but upon",
)
"""Lower case. A space stands for any white space, an apostrophe also for ’, a hyphen may be left out or a space."""


def _pattern(phrase: str) -> str:
    escaped = re.escape(phrase).replace(r"\ ", r"\s+").replace("'", "['’]")
    return escaped.replace(r"\-", r"[-‐‑\s]?")


# Longest first, so that "let me check again" is one phrase rather than the shorter one it starts with.
REFLECTION = re.compile(
    r"\b(?:" + "|".join(map(_pattern, sorted(REFLECTIVE_PHRASES, key=len, reverse=True))) + r")\b", re.IGNORECASE
)
"""Matches each phrase as whole words, in any case: "waiting" is not "wait"."""


def is_reflective(text: str) -> bool:
    """Whether the text holds a reflective phrase."""
    return REFLECTION.search(text) is not None


def count_reflections(text: str) -> int:
    """How many reflective phrases the text holds; overlapping ones count once."""
    return sum(1 for _ in REFLECTION.finditer(text))
