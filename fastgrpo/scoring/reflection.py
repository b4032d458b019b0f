"""Phrases in which a model doubts or re-examines its own reasoning (the "aha moment")."""

import re
from pathlib import Path

REFLECTIVE_PHRASES = tuple(
    line.strip()
    for line in (Path(__file__).parent / "reflective_phrases.txt").read_text(encoding="utf-8").splitlines()
    if line.strip() and not line.startswith("#")
)
"""From reflective_phrases.txt, which says how they are written."""


def _pattern(phrase: str) -> str:
    escaped = re.escape(phrase).replace(r"\ ", r"\s+").replace("'", "['’]")
    return escaped.replace(r"\-", r"[-‐‑\s]?")


# Longest first, so that "let me check again" is one phrase rather than the shorter one it starts with.
REFLECTION = re.compile(
    r"\b(?:" + "|".join(map(_pattern, sorted(REFLECTIVE_PHRASES, key=len, reverse=True))) + r")\b", re.IGNORECASE
)
"""Matches each phrase as whole words, in any case: "waiting" is not "wait"."""


def count_reflections(text: str) -> int:
    """How many reflective phrases the text holds; overlapping ones count once."""
    return sum(1 for _ in REFLECTION.finditer(text))
