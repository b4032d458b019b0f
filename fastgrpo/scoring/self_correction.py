"""Self-correction: an option is proposed in the reasoning, and another one answered.

A word such as "wait" may be a habit; that the answer differs from what was proposed before it is an act. Only what
names an option behind a phrase that settles on one counts as proposed (`_PROPOSING`), so neither a description ("the
red ball is left of …") nor options that are restated ("red or blue?") do:

| phrase | like |
|---|---|
| answer, option or choice is | "The answer is (B)" |
| so, thus, hence, therefore | "so it is red", "Thus, (A)." |
| I think, guess, believe, say, choose, pick | "I guess it is 3" |
| it is, seems, looks like, must be; maybe, probably | "it seems to be left", "probably red" |

The first proposal is compared with the answer in `<answer>` tags, which is read as the reward reads it.
"""

import re
import string
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from fastgrpo.scoring.answers import answers_match, normalise, parse_answer

Correction = Literal["wrong to right", "right to wrong", "wrong to wrong"]

_BE = r"(?:is|'s|was|must be|should be|would be|could be|might be|seems(?: to be)?|appears to be|looks like)"
_PROPOSING = "|".join(
    [
        rf"\b(?:answer|option|choice) ?(?:{_BE}|:|=)",
        r"\b(?:so|thus|hence|therefore),?",
        r"\bi(?:'d|'ll| would| will)? (?:think|guess|believe|say|choose|pick)(?: that)?",
        rf"\b(?:it|that|this) ?{_BE}",
        r"\b(?:maybe|perhaps|probably)",
    ]
)
_BETWEEN = (
    rf"(?: (?:it|that|this|(?:the |my )?(?:final |correct |right )?(?:answer|option|choice)) ?{_BE})?:? ?(?:the |an? )?"
)


def self_correction(text: str, options: Sequence[str], gold: str) -> Correction | None:
    """How the answer differs from what the reasoning proposed first; None where it does not, or either is not there.

    Args:
        text: a completion; what stands before its `<answer>` is the reasoning.
        options: the question's options, (A) first.
        gold: the right answer, in any form that `answers_match` takes.
    """
    answer = parse_answer(text)
    if answer is None:
        return None
    proposed = first_proposal(text.partition("<answer>")[0], options)
    answered = _place(answer, options)
    if proposed is None or answered is None or proposed == answered:
        return None
    right = _place(gold, options)
    if answered == right:
        return "wrong to right"
    return "right to wrong" if proposed == right else "wrong to wrong"


def first_proposal(reasoning: str, options: Sequence[str]) -> int | None:
    """The place of the option that a text proposes first, (A) = 0; None where it proposes none."""
    plain = " ".join(reasoning.replace("’", "'").split()).casefold()
    found = _pattern(tuple(map(normalise, options))).search(plain)
    if found is None:
        return None
    return next(int(name[1:]) % len(options) for name, group in found.groupdict().items() if group is not None)


def _place(answer: str, options: Sequence[str]) -> int | None:
    return next((i for i, option in enumerate(options) if answers_match(answer, option, options)), None)


@lru_cache(maxsize=4096)
def _pattern(options: tuple[str, ...]) -> re.Pattern[str]:
    """Finds a phrase and behind it an option: its letter (groups x0, x1, …) or its text (t0, t1, …)."""
    count = len(options)
    letters = [
        rf"(?P<x{i}>\({letter}\)|{letter}(?=[.):]|$))" for i, letter in enumerate(string.ascii_lowercase[:count])
    ]
    # The longest first, so that "light blue" is not read as "light".
    order = sorted(range(min(count, 26)), key=lambda i: -len(options[i]))
    texts = [rf"(?P<t{count + i}>{re.escape(options[i])}(?![\w'-]))" for i in order]
    one = "|".join([*letters, *texts])
    any_text = "|".join(re.escape(options[i]) for i in order)
    # Behind "so red or blue" nothing was settled, nor by a question.
    return re.compile(rf"(?:{_PROPOSING}){_BETWEEN}[\"'(]?(?:{one})(?! or (?:the )?(?:\(|{any_text}))(?! ?\?)")
