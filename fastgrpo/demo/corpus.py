"""The pretraining corpora of the tiny models: questions about synthetic scenes, with reasoned and guessed answers.

A document is a picture, a question in one of the demo's two prompt wordings, a completion, and after the end token a
description of the picture ("across: red 2, blue 5. down: blue 1, red 4."; places are numbered 1 to 5 from the left and
from the top).
Most completions are guesses: an option drawn at random ("i guess it is left."), correct no more often than chance, with
or without answer tags. The reasoned ones ("let me check.") repeat the objects asked about with their places, and give
the correct answer in tags. A `Mix` changes that: the miniature of the paper's experiment has others
(`fastgrpo.demo.miniature`).
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fastgrpo.demo.scenes import COUNTS, SceneObject, SceneQuestion

PLACES = 5
"""Number of places along each side of a picture."""
OPENERS = (" i guess it is", " it seems to be", " maybe it is", " probably")
RECHECK = " wait, let me check again:"


@dataclass(frozen=True)
class Mix:
    """How completions are worded, and how often they are right. The defaults are the demo's."""

    opener: str = " let me check."
    """Begins a reasoned completion."""
    tagged_guesses: tuple[float, float, float] = (0.7, 0.25, 0.35)
    """Share of guesses in answer tags, for each wording of the question."""
    tagged_reasons: float = 1.0
    """Share of reasoned completions in answer tags."""
    guesses_know: bool = False
    """Guesses are the gold answer, not an option drawn at random."""
    count_each: bool = False
    """A reasoned count of all objects names the number of each colour first."""
    slips: float = 0.0
    """Share of reasoned completions whose first look is a `hasty` one."""
    rechecks: tuple[float, float] = (0.0, 0.0)
    """Shares of those with a careful and with a hasty first look that look a second time, then carefully."""


DEMO_MIX = Mix()


def place(fraction: float) -> int:
    """The place, 1 … PLACES, of a coordinate given as a fraction of the side."""
    return 1 + int(np.clip((fraction - 0.1) / 0.8 * PLACES, 0, PLACES - 1))


def description(question: SceneQuestion, rng: np.random.Generator) -> str:
    """The places of all objects, or for a counting question the number of each colour; in random order."""
    things = [question.objects[i] for i in rng.permutation(len(question.objects))]
    if question.kind == "count":
        counts = Counter(thing.colour for thing in things)
        colours = ",".join(f" {colour} {count}" for colour, count in counts.items())
        return f" counts:{colours}, all {len(things)}."
    across = ",".join(f" {thing.colour} {place(thing.x)}" for thing in things)
    things = [things[i] for i in rng.permutation(len(things))]
    down = ",".join(f" {thing.colour} {place(thing.y)}" for thing in things)
    return f" across:{across}. down:{down}."


def looking(question: SceneQuestion, count_each: bool = False) -> str:
    """The reasoning before a reasoned answer: the number counted, or the places of the objects in the question."""
    if question.kind == "count":
        colours = Counter(thing.colour for thing in question.subjects)
        what = next((colour for colour in colours if f" {colour} objects" in question.question), "all")
        each = [f" {colour} {count}" for colour, count in colours.items()] if count_each and what == "all" else []
        return f" counts:{','.join([*each, f' {what} {len(question.subjects)}'])}."
    across = ",".join(f" {thing.colour} {place(thing.x)}" for thing in question.subjects)
    down = ",".join(f" {thing.colour} {place(thing.y)}" for thing in question.subjects)
    if question.kind == "distance":
        return f" across:{across}. down:{down}."
    return f" across:{across}." if question.kind == "left_right" else f" down:{down}."


def hasty(question: SceneQuestion, rng: np.random.Generator) -> SceneQuestion:
    """The question as a hasty look sees it: another number of objects, or its two objects in each other's place.

    The answer is wrong, and the one that follows from what was seen.
    """
    if question.kind == "count":
        count = int(rng.choice([count for count in COUNTS if str(count) != question.answer]))
        return replace(question, subjects=(question.subjects * max(COUNTS))[:count], answer=str(count))
    (first, second), (answer,) = question.subjects, [c for c in question.choices if c != question.answer]
    return replace(question, subjects=(_moved(first, second), _moved(second, first)), answer=answer)


def _moved(thing: SceneObject, place_of: SceneObject) -> SceneObject:
    return replace(thing, x=place_of.x, y=place_of.y)


def completion(question: SceneQuestion, rng: np.random.Generator, careful: float, mix: Mix = DEMO_MIX) -> str:
    """The text after `<think>`, without the end token; reasoned with probability `careful`, else a guess."""
    if rng.random() < careful:
        thought, answer = _reasoning(question, rng, mix)
        tagged = _draw(mix.tagged_reasons, rng)
    else:
        answer = question.answer if mix.guesses_know else _choice(rng, question.choices)
        thought = f"{_choice(rng, OPENERS)} {answer}."
        tagged = rng.random() < mix.tagged_guesses[question.wording]
    if tagged:
        return f"{thought} </think> <answer>{answer}</answer>"
    return thought if rng.random() < 0.5 else f"{thought} the answer is {answer}."


AnswerKind = Literal["guess", "look", "check"]
_LOOK = re.compile(r" (?:across|down|counts):")


def answer_kind(text: str) -> AnswerKind:
    """Whether a completion looks at the picture's objects, and whether it then checks."""
    return "check" if RECHECK in text else "look" if _LOOK.search(text) else "guess"


def _reasoning(question: SceneQuestion, rng: np.random.Generator, mix: Mix) -> tuple[str, str]:
    """The text, and the answer that it arrives at."""
    slips = _draw(mix.slips, rng)
    seen = hasty(question, rng) if slips else question
    text = f"{mix.opener}{looking(seen, mix.count_each)} so {seen.answer}."
    if not _draw(mix.rechecks[slips], rng):
        return text, seen.answer
    return f"{text}{RECHECK}{looking(question, mix.count_each)} so {question.answer}.", question.answer


def _draw(share: float, rng: np.random.Generator) -> bool:
    """True with probability `share`. Nothing is drawn where it is 0 or 1, so the demo's corpus stays as it was."""
    return rng.random() < share if 0 < share < 1 else share >= 1


def _choice(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def corpus_texts(questions: Sequence[SceneQuestion], prompts: Sequence[str], seed: int = 0) -> list[str]:
    """Documents as plain text, to train the tokenizer on."""
    rng = np.random.default_rng(seed)
    return [
        prompt + completion(question, rng, careful=0.5) + "\n" + description(question, rng)
        for question, prompt in zip(questions, prompts, strict=True)
    ]
