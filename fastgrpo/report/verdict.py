"""What a run's evaluations say in words: are more answers right, and do they depend on the pictures."""

from dataclasses import dataclass
from typing import Literal

from fastgrpo.evaluation.summary import RunSummary
from fastgrpo.report.formats import percent
from fastgrpo.report.intervals import Difference, Proportion, difference

Tone = Literal["yes", "partly", "no", "unknown"]

MIN_QUESTIONS = 50
"""Answered questions below which nothing is judged: the 95 % interval of a share is then up to ±13 points wide."""


@dataclass(frozen=True)
class Verdict:
    """A judgement, the sentence that gives its figures, and what it does not say."""

    tone: Tone
    label: str
    sentence: str
    not_claimed: str = ""


NOT_SEEING = (
    "that training taught the model to see. A model that could see before, and seldom used it, would show the same."
)


@dataclass(frozen=True)
class Answered:
    """Accuracy among the answers in the form, with how many there were; None where not measured."""

    before: Proportion | None
    after: Proportion | None
    shuffled: Proportion | None
    """After training, each question with the pictures of another."""

    @classmethod
    def of(cls, headline: RunSummary) -> "Answered":
        """From a run's figures."""
        rates = (
            headline.answered_rate_before,
            headline.answered_rate_after,
            headline.answered_rate_shuffled_images or headline.answered_rate_after,
        )
        accuracies = (
            headline.answered_accuracy_before,
            headline.answered_accuracy_after,
            headline.answered_accuracy_shuffled_images,
        )
        return cls(*(_among(headline.num_questions, *pair) for pair in zip(accuracies, rates, strict=True)))


def _among(questions: int | None, accuracy: float | None, rate: float | None) -> Proportion | None:
    return Proportion.known(accuracy, None if questions is None else round(questions * (1.0 if rate is None else rate)))


def judge_answers(headline: RunSummary) -> Verdict:
    """Whether more answers are right than before training, and whether they depend on the pictures.

    Right means: accuracy among *answered* questions rises, so that the rise is not one of form. It depends on the
    pictures where that accuracy is lower about another question's picture. A difference counts when its 95 % interval
    leaves out zero.
    """
    unknown = _lacking(headline)
    if unknown is not None:
        return unknown
    found = Answered.of(headline)
    assert found.after is not None, "nothing is lacking"
    fewest = min(one.n for one in (found.before, found.after) if one is not None)
    if fewest < MIN_QUESTIONS:
        told = f"{fewest} answered questions are compared; a judgement takes {MIN_QUESTIONS}."
        return Verdict("unknown", "Not enough questions", told)
    rise, told = _rise(headline, found.before, found.after)
    fall = None if found.shuffled is None else difference(found.shuffled, found.after)
    if not rise.is_rise:
        return _no_rise(headline, rise, told, fall)
    if found.shuffled is None or fall is None:
        rest = f"{told}. It was not evaluated with shuffled pictures."
        return Verdict("unknown", "More right answers; whether from the pictures was not tested", rest, NOT_SEEING)
    told += f". With pictures shuffled between questions it is {found.shuffled.text}"
    if not fall.is_rise:
        return Verdict("no", "More right answers, not shown to depend on the pictures", f"{told}.", NOT_SEEING)
    told += f": the right picture adds {fall.text}."
    if fall.value >= 0.5 * rise.value:
        return Verdict("yes", "More right answers, and they depend on the pictures", told, NOT_SEEING)
    return Verdict("partly", "More right answers, most of the gain without the right picture", told, NOT_SEEING)


def _lacking(headline: RunSummary) -> Verdict | None:
    """What is missing for a comparison, or None."""
    for when in ("after", "before"):
        rate = getattr(headline, f"answered_rate_{when}")
        if getattr(headline, f"answered_accuracy_{when}") is not None:
            continue
        if when == "before" and rate == 0 and headline.chance is not None:
            continue  # compared with guessing
        if rate == 0:
            told = f"No question was answered in the form asked for {when} training, so there is nothing to compare."
            return Verdict("unknown", "Not known", told)
        return Verdict("unknown", "Not known yet", f"There is no evaluation from {when} training to compare with.")
    if headline.num_questions is None:
        told = "The number of questions was not kept, so no interval can be given."
        return Verdict("unknown", "Number of questions not known", told)
    return None


def _rise(headline: RunSummary, before: Proportion | None, after: Proportion) -> tuple[Difference, str]:
    """From before to after, and in words; from guessing where nothing was answered before."""
    chance = headline.chance
    guessing = "" if chance is None else f"; guessing gives {percent(chance)}"
    if before is not None:
        rise = difference(before, after)
        told = f"Among answered questions, accuracy went from {before.text} to {after.text}: {rise.text}{guessing}"
        return rise, told
    assert chance is not None, "nothing is lacking"
    rise = difference(chance, after)
    told = "Before training no question was answered in the form asked for; after it, accuracy among those answered is "
    return rise, f"{told}{after.text}{guessing}: {rise.text}"


def _no_rise(headline: RunSummary, rise: Difference, told: str, fall: Difference | None) -> Verdict:
    """Accuracy among the answered did not rise; did the total?"""
    if fall is not None and fall.is_rise:
        told += f". The right picture adds {fall.text} after training"
    if rise.is_fall:
        return Verdict("no", "Fewer right answers than before", f"{told}.")
    n = headline.num_questions
    before, after = (Proportion.known(value, n) for value in (headline.accuracy_before, headline.accuracy_after))
    total = None if before is None or after is None else difference(before, after)
    if before is not None and after is not None and total is not None and total.is_rise:
        told += f". Over all questions it rose from {before.text} to {after.text}"
        return Verdict("no", "More answers in the form, not more right among them", f"{told}.")
    return Verdict("no", "Not shown to answer more questions right", f"{told}.")
