"""What the page says of the step log follows from its columns."""

import re

import numpy as np
import pytest

from fastgrpo.report.run import Metrics
from fastgrpo.report.trends import judge_responses, trend


def metrics(length: tuple[float, float], reflection: tuple[float, float], accuracy: tuple[float, float]) -> Metrics:
    """100 steps, each metric rising in a line with a little noise."""
    noise = np.random.default_rng(0)
    ends = {"completions/mean_length": length, "reflection_rate": reflection, "rewards/tagged_accuracy/mean": accuracy}
    columns = {name: np.linspace(*pair, 100) * (1 + 0.02 * noise.standard_normal(100)) for name, pair in ends.items()}
    return Metrics(np.arange(1, 101), columns)


@pytest.mark.parametrize(
    ("length", "reflection", "accuracy", "tone", "label"),
    [
        ((90, 250), (0.02, 0.4), (0.3, 0.6), "yes", "Longer, more reflective, and more often right"),
        ((90, 250), (0.02, 0.4), (0.3, 0.3), "partly", "Longer and more reflective, not clearly more often right"),
        ((90, 90), (0.02, 0.4), (0.3, 0.6), "partly", "More reflective, not clearly longer"),
        ((90, 250), (0.02, 0.02), (0.3, 0.6), "no", "Longer, not clearly more reflective"),
        ((250, 90), (0.02, 0.02), (0.3, 0.6), "no", "Shorter, and not clearly more reflective"),
        ((90, 90), (0.0, 0.0), (0.3, 0.6), "no", "Neither clearly longer nor clearly more reflective"),
    ],
)
def test_responses(
    length: tuple[float, float], reflection: tuple[float, float], accuracy: tuple[float, float], tone: str, label: str
) -> None:
    verdict = judge_responses(metrics(length, reflection, accuracy))
    assert (verdict.tone, verdict.label) == (tone, label)


def test_longer_more_reflective_answers_that_change_no_answer_are_no_yes() -> None:
    def with_corrections(last: float) -> Metrics:
        found = metrics((90, 250), (0.02, 0.4), (0.3, 0.6))
        corrected = {"self_correction/wrong_to_right": np.linspace(0, last, 100)}
        return Metrics(found.steps, {**found.columns, **corrected, "self_correction/right_to_wrong": np.zeros(100)})

    assert judge_responses(with_corrections(0.2)).tone == "yes"
    verdict = judge_responses(with_corrections(0.0))
    assert (verdict.tone, verdict.label) == (
        "partly",
        "Longer, more reflective, more often right; no clear rise in self-correction",
    )
    assert "differ from the option proposed first" in verdict.sentence


def test_responses_are_told_with_intervals_and_what_is_not_claimed() -> None:
    verdict = judge_responses(metrics((90, 250), (0.02, 0.4), (0.3, 0.6)))
    sentence = verdict.sentence.replace("\N{NO-BREAK SPACE}", " ")
    assert "From the first to the last 10 steps" in sentence
    assert re.search(r"tokens \(\+14\d\.\d, 95 % interval \+1\d\d\.\d to \+1\d\d\.\d\)", sentence)
    assert verdict.not_claimed.startswith("that the model reasons")


def test_what_was_not_logged_is_not_judged() -> None:
    assert judge_responses(Metrics(np.arange(0), {})).label == "Not measured"
    logged = metrics((90, 250), (0.02, 0.4), (0.3, 0.6))
    few = {name: column[:19] for name, column in logged.columns.items()}
    assert judge_responses(Metrics(np.arange(19), few)).label == "Not enough steps"
    columns = {name: column for name, column in logged.columns.items() if "accuracy" not in name}
    label = judge_responses(Metrics(logged.steps, columns)).label
    assert label == "Longer and more reflective; no accuracy reward to tell more"


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
