"""Reflective phrases: found as whole phrases, in any case and spacing."""

import pytest

from fastgrpo.scoring.reflection import REFLECTIVE_PHRASES, count_reflections

REFLECTIVE = [
    "Wait, the chair is behind the table.",
    "hmm... no",
    "Let me check the picture.",
    "LET ME LOOK AGAIN",
    "let me\n  look   again",
    "Let’s re-examine it",
    "let's reexamine it",
    "I should double check",
    "I should double-check",
    "Actually it is left",
    "On second thought, right.",
]
PLAIN = [
    "The waiter is waiting; awaited.",
    "The chair is to the left of the table.",
    "the actual size",
    "Checkmate",
    "a hmmm-like sound",
    "",
    "let me explain",
]


@pytest.mark.parametrize("text", REFLECTIVE)
def test_reflective(text: str) -> None:
    assert count_reflections(text) >= 1


@pytest.mark.parametrize("text", PLAIN)
def test_not_reflective(text: str) -> None:
    assert count_reflections(text) == 0


@pytest.mark.parametrize("phrase", REFLECTIVE_PHRASES)
def test_every_phrase_is_found_once_in_any_case(phrase: str) -> None:
    for text in (phrase, phrase.upper(), f"So, {phrase}.", phrase.replace("'", "’")):
        assert count_reflections(text) == 1


def test_phrases_are_counted_without_overlap() -> None:
    assert count_reflections("Wait. Wait! Let me check. Let me check again") == 4
    assert count_reflections("let me look again") == 1
