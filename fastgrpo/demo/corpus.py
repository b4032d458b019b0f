"""What the demo's base model reads: questions on synthetic scenes, answered by people of different care.

Each document is a picture, a question in one of the two prompt wordings the demo uses, a completion, and behind its
end token a description of the picture ("across: red 2, blue 5. down: blue 1, red 4.", places counted 1 to 5 from the
left and from the top).
Most completions are guesses: an option drawn at random ("i guess it is left."), tagged or not by a habit that goes with
the question's wording, right no more often than chance. The careful ones ("let me check.") restate what the question is
about with its places, and answer, tagged.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from fastgrpo.demo.scenes import SceneQuestion

PLACES = 5
"""Places counted along each side of a picture."""
OPENERS = (" i guess it is", " it seems to be", " maybe it is", " probably")
TAGGED_GUESSES = (0.7, 0.25, 0.35)
"""Share of guesses put into the tags, by the question's wording: writers have habits."""


def place(fraction: float) -> int:
    """1 … PLACES of a coordinate given as a fraction of the side."""
    return 1 + int(np.clip((fraction - 0.1) / 0.8 * PLACES, 0, PLACES - 1))


def description(question: SceneQuestion, rng: np.random.Generator) -> str:
    """Every object's places, or for a count how many there are of each colour; in random order."""
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
    """What a careful writer restates before deciding: the counted number, or the named objects' places."""
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
    """The text after `<think>`, without the end token; careful with the given probability."""
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
    """Plain texts of documents, for the tokenizer."""
    rng = np.random.default_rng(seed)
    return [
        prompt + completion(question, rng, careful=0.5) + "\n" + description(question, rng)
        for question, prompt in zip(questions, prompts, strict=True)
    ]
