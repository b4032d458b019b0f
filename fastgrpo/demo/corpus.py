"""The pretraining corpus of the demo's base model: questions about synthetic scenes, with reasoned and guessed answers.

A document is a picture, a question in one of the demo's two prompt wordings, a completion, and after the end token a
description of the picture ("across: red 2, blue 5. down: blue 1, red 4."; places are numbered 1 to 5 from the left and
from the top).
Most completions are guesses: an option drawn at random ("i guess it is left."), correct no more often than chance, with
or without answer tags. The reasoned ones ("let me check.") repeat the objects asked about with their places, and give
the correct answer in tags.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from fastgrpo.demo.scenes import SceneQuestion

PLACES = 5
"""Number of places along each side of a picture."""
OPENERS = (" i guess it is", " it seems to be", " maybe it is", " probably")
TAGGED_GUESSES = (0.7, 0.25, 0.35)
"""Share of guesses in answer tags, for each wording of the question."""


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


def looking(question: SceneQuestion) -> str:
    """The reasoning before a reasoned answer: the number counted, or the places of the objects in the question."""
    if question.kind == "count":
        colours = {thing.colour for thing in question.subjects}
        what = next((colour for colour in colours if f" {colour} objects" in question.question), "all")
        return f" counts: {what} {len(question.subjects)}."
    across = ",".join(f" {thing.colour} {place(thing.x)}" for thing in question.subjects)
    down = ",".join(f" {thing.colour} {place(thing.y)}" for thing in question.subjects)
    if question.kind == "distance":
        return f" across:{across}. down:{down}."
    return f" across:{across}." if question.kind == "left_right" else f" down:{down}."


def completion(question: SceneQuestion, rng: np.random.Generator, careful: float) -> str:
    """The text after `<think>`, without the end token; reasoned with probability `careful`, else a guess."""
    if rng.random() < careful:
        answer = question.answer
        return f" let me check.{looking(question)} so {answer}. </think> <answer>{answer}</answer>"
    guess = _choice(rng, question.choices)
    opening = f"{_choice(rng, OPENERS)} {guess}."
    if rng.random() < TAGGED_GUESSES[question.wording]:
        return f"{opening} </think> <answer>{guess}</answer>"
    return opening if rng.random() < 0.5 else f"{opening} the answer is {guess}."


def _choice(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def corpus_texts(questions: Sequence[SceneQuestion], prompts: Sequence[str], seed: int = 0) -> list[str]:
    """Documents as plain text, to train the tokenizer on."""
    rng = np.random.default_rng(seed)
    return [
        prompt + completion(question, rng, careful=0.5) + "\n" + description(question, rng)
        for question, prompt in zip(questions, prompts, strict=True)
    ]
