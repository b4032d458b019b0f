"""What the page says in words follows from the figures."""

from dataclasses import replace

import numpy as np
import pytest

from fastgrpo.evaluation.summary import RunSummary
from fastgrpo.report.run import Metrics
from fastgrpo.report.verdict import judge_reasoning, judge_seeing, trend

NOTHING = RunSummary()
SEES = replace(
    NOTHING,
    accuracy_before=0.31,
    accuracy_after=0.59,
    answered_rate_before=0.5,
    answered_rate_after=0.98,
    answered_accuracy_before=0.46,
    answered_accuracy_after=0.61,
    answered_accuracy_shuffled_images=0.47,
    chance=0.44,
    num_questions=2638,
)


def test_learned_to_see() -> None:
    verdict = judge_seeing(SEES)
    assert (verdict.tone, verdict.label) == ("yes", "It learned to see")
    for figure in ("46.0", "61.0", "47.0", "44.0"):
        assert figure in verdict.sentence


@pytest.mark.parametrize(
    ("changed", "tone", "label"),
    [
        ({"answered_accuracy_shuffled_images": 0.60}, "no", "It learned to answer, not to see"),
        ({"answered_accuracy_shuffled_images": 0.56}, "partly", "It learned to see in part"),
        ({"answered_accuracy_shuffled_images": None}, "unknown", "Better answers, cause unknown"),
        ({"answered_accuracy_after": 0.46}, "no", "It learned the form, not to see"),
        ({"answered_accuracy_after": 0.46, "accuracy_after": 0.31}, "no", "It did not learn to see"),
        ({"answered_accuracy_after": 0.30}, "no", "It sees less than before"),
        ({"answered_accuracy_after": None}, "unknown", "Not known yet"),
        ({"answered_accuracy_before": None}, "unknown", "Not known yet"),
        # The same rise from 40 questions is noise.
        ({"num_questions": 40}, "no", "It learned the form, not to see"),
    ],
)
def test_seeing_flips_with_the_figures(changed: dict[str, float | None], tone: str, label: str) -> None:
    verdict = judge_seeing(replace(SEES, **changed))  # type: ignore[arg-type]
    assert (verdict.tone, verdict.label) == (tone, label)


def test_a_base_model_that_never_answers_is_compared_with_chance() -> None:
    mute = replace(SEES, answered_accuracy_before=None, answered_rate_before=0.0)
    verdict = judge_seeing(mute)
    assert verdict.label == "It learned to see"
    assert "Before training no question was answered" in verdict.sentence
    guessing = replace(mute, answered_accuracy_after=0.44, answered_accuracy_shuffled_images=0.44)
    assert judge_seeing(guessing).label == "It learned the form, not to see"
    silent = judge_seeing(replace(mute, answered_accuracy_after=None, answered_rate_after=0.0))
    assert (silent.tone, silent.label) == ("unknown", "Not known")


def test_says_when_it_could_see_before() -> None:
    could = replace(SEES, answered_accuracy_before=0.61)
    assert "did so before training" in judge_seeing(could).sentence
    blind = replace(could, answered_accuracy_shuffled_images=0.61)
    assert "did so before training" not in judge_seeing(blind).sentence


def metrics(length: tuple[float, float], reflection: tuple[float, float], accuracy: tuple[float, float]) -> Metrics:
    """100 steps, each metric rising in a line with a little noise."""
    noise = np.random.default_rng(0)
    ends = {"completions/mean_length": length, "reflection_rate": reflection, "rewards/accuracy_reward/mean": accuracy}
    columns = {name: np.linspace(*pair, 100) * (1 + 0.02 * noise.standard_normal(100)) for name, pair in ends.items()}
    return Metrics(np.arange(1, 101), columns)


@pytest.mark.parametrize(
    ("length", "reflection", "accuracy", "tone", "label"),
    [
        ((90, 250), (0.02, 0.4), (0.3, 0.6), "yes", "Reasoning emerged"),
        ((90, 250), (0.02, 0.4), (0.3, 0.3), "partly", "Longer and more reflective, not more right"),
        ((90, 90), (0.02, 0.4), (0.3, 0.6), "partly", "More reflective, not longer"),
        ((90, 250), (0.02, 0.02), (0.3, 0.6), "no", "Longer, not more reflective"),
        ((250, 90), (0.02, 0.02), (0.3, 0.6), "no", "No reasoning emerged"),
        ((90, 90), (0.0, 0.0), (0.3, 0.6), "no", "No reasoning emerged"),
    ],
)
def test_reasoning(
    length: tuple[float, float], reflection: tuple[float, float], accuracy: tuple[float, float], tone: str, label: str
) -> None:
    verdict = judge_reasoning(metrics(length, reflection, accuracy))
    assert (verdict.tone, verdict.label) == (tone, label)


def test_reasoning_needs_steps() -> None:
    assert judge_reasoning(Metrics(np.arange(0), {})).tone == "unknown"


def test_trend_is_first_against_last_tenth() -> None:
    column = np.concatenate([np.full(10, 2.0), np.full(80, np.pi), np.full(10, 5.0), [np.nan]])
    found = trend(column)
    assert found is not None
    assert (found.first, found.last, found.rose, found.fell) == (2.0, 5.0, True, False)
    assert trend(column[:19]) is None
    assert trend(None) is None


def test_trend_of_noise_is_flat() -> None:
    found = trend(np.random.default_rng(3).standard_normal(60) + 1)
    assert found is not None
    assert not found.rose
    assert not found.fell
