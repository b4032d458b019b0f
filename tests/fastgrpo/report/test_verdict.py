"""What the page says of the evaluations follows from their figures, and says no more than they do."""

from dataclasses import replace

import pytest

from fastgrpo.evaluation.summary import RunSummary
from fastgrpo.report.verdict import MIN_QUESTIONS, judge_answers

NOTHING = RunSummary()
RISES = replace(
    NOTHING,
    accuracy_before=0.31,
    accuracy_after=0.59,
    answered_rate_before=0.5,
    answered_rate_after=0.98,
    answered_accuracy_before=0.46,
    answered_accuracy_after=0.61,
    answered_rate_shuffled_images=0.97,
    answered_accuracy_shuffled_images=0.47,
    chance=0.44,
    num_questions=2638,
)


def test_a_rise_that_depends_on_the_pictures_is_told_with_intervals_and_n() -> None:
    verdict = judge_answers(RISES)
    assert (verdict.tone, verdict.label) == ("yes", "More right answers, and they depend on the pictures")
    sentence = verdict.sentence.replace("\N{NO-BREAK SPACE}", " ")
    assert "from 46.0 % (43.3 to 48.7, n = 1,319) to 61.0 % (59.1 to 62.9, n = 2,585)" in sentence
    assert "+15.0 points, 95 % interval +11.7 to +18.3; guessing gives 44.0 %" in sentence
    assert "shuffled between questions it is 47.0 % (45.1 to 48.9, n = 2,559)" in sentence


def test_never_says_that_it_learned_to_see() -> None:
    verdict = judge_answers(RISES)
    assert "see" not in verdict.label.split()
    assert verdict.not_claimed.startswith("that training taught the model to see")


@pytest.mark.parametrize(
    ("changed", "tone", "label"),
    [
        ({"answered_accuracy_shuffled_images": 0.60}, "no", "More right answers, not shown to depend on the pictures"),
        (
            {"answered_accuracy_shuffled_images": 0.56},
            "partly",
            "More right answers, most of the gain without the right picture",
        ),
        (
            {"answered_accuracy_shuffled_images": None},
            "unknown",
            "More right answers; whether from the pictures was not tested",
        ),
        ({"answered_accuracy_after": 0.46}, "no", "More answers in the form, not more right among them"),
        (
            {"answered_accuracy_after": 0.46, "accuracy_after": 0.31},
            "no",
            "Not shown to answer more questions right",
        ),
        ({"answered_accuracy_after": 0.36}, "no", "Fewer right answers than before"),
        ({"answered_accuracy_after": None}, "unknown", "Not known yet"),
        ({"answered_accuracy_before": None}, "unknown", "Not known yet"),
        ({"num_questions": None}, "unknown", "Number of questions not known"),
        # The same rise among 55 and 108 answered questions could be noise.
        ({"num_questions": 110}, "no", "More answers in the form, not more right among them"),
        # 49 of 98 were answered before training, then 50 of 100.
        ({"num_questions": 98}, "unknown", "Not enough questions"),
    ],
)
def test_the_verdict_flips_with_the_figures(changed: dict[str, float | None], tone: str, label: str) -> None:
    verdict = judge_answers(replace(RISES, **changed))  # type: ignore[arg-type]
    assert (verdict.tone, verdict.label) == (tone, label)


def test_says_how_many_questions_it_takes() -> None:
    few = judge_answers(replace(RISES, num_questions=98))
    assert few.sentence == f"49 answered questions are compared; a judgement takes {MIN_QUESTIONS}."
    assert judge_answers(replace(RISES, num_questions=100)).label != "Not enough questions"


def test_a_base_model_that_never_answers_is_compared_with_guessing() -> None:
    mute = replace(RISES, answered_accuracy_before=None, answered_rate_before=0.0)
    verdict = judge_answers(mute)
    assert verdict.label == "More right answers, and they depend on the pictures"
    assert "Before training no question was answered" in verdict.sentence
    guessing = replace(mute, answered_accuracy_after=0.44, answered_accuracy_shuffled_images=0.44)
    assert judge_answers(guessing).label == "More answers in the form, not more right among them"
    silent = judge_answers(replace(mute, answered_accuracy_after=None, answered_rate_after=0.0))
    assert (silent.tone, silent.label) == ("unknown", "Not known")


def test_says_what_the_picture_adds_where_nothing_rose() -> None:
    could = replace(RISES, answered_accuracy_before=0.61)
    assert "The right picture adds +14.0 points" in judge_answers(could).sentence
    blind = replace(could, answered_accuracy_shuffled_images=0.61)
    assert "picture adds" not in judge_answers(blind).sentence
