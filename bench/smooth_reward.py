"""A reward that any text earns part of, so that learning shows within a few steps."""

from typing import Any

WANTED = set("aeiou ")


def vowels(completions: list[Any], **columns: Any) -> list[float]:
    """Share of a completion's characters that are vowels or spaces. Takes texts, or TRL's conversations."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    parts = [text if isinstance(text, str) else "".join(p.get("text", "") for p in text) for text in texts]
    return [sum(c in WANTED for c in text.lower()) / max(len(text), 1) for text in parts]
