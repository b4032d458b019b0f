"""What is guessed from what was drawn."""

from typing import Any

import pytest
import torch

from fastgrpo.sampler.guesser import LONGEST, PLACES, Guesser
from fastgrpo.sampler.speculation import Acceptance


def learnt(*texts: list[int]) -> Guesser:
    guesser = Guesser(torch.device("cpu"))
    for text in texts:
        drawn = torch.tensor([[-1] * LONGEST + text])
        guesser.learn(drawn, torch.ones(1, len(text), dtype=torch.bool))
    return guesser


def guess(guesser: Guesser, text: list[int], count: int = 3, least: float = 0.0) -> list[int]:
    last = ([-1] * LONGEST + text)[-LONGEST:]
    return guesser.guess(torch.tensor([last[::-1]]), count, least)[0].tolist()


@pytest.mark.parametrize(
    ("texts", "text", "expected"),
    [
        ([[5, 6, 7, 8, 9]], [6], [7, 8, 9]),  # by one token, then by more
        ([[5, 6, 7, 8, 9]], [5, 6, 7], [8, 9, -1]),  # nothing came behind the 9
        ([[5, 6, 7, 8, 9]], [10], [-1, -1, -1]),
        ([[1, 2, 3], [4, 2, 5], [6, 2, 5]], [1, 2], [3, -1, -1]),  # the longest n-gram, not the likeliest token
        ([[1, 2, 3], [4, 2, 5], [6, 2, 5]], [9, 2], [5, -1, -1]),
        ([[0, 0, 0, 0, 0, 0]], [0, 0], [0, 0, 0]),  # the token 0 is a token
        ([[5, 6], [5, 6]], [], [5, 6, -1]),  # from the start
    ],
)
def test_the_likeliest_token_behind_the_longest_known_ending(texts: Any, text: Any, expected: Any) -> None:
    assert guess(learnt(*texts), text) == expected


def test_a_guess_ends_where_its_chance_falls_below_the_least() -> None:
    guesser = learnt([1, 2, 3], [1, 2, 3], [1, 2, 4])  # chances by count: 2 behind 1: 3 / 3.5, then 3: 2 / 3.5
    assert guess(guesser, [1], 2, least=0.8) == [2, -1]
    assert guess(guesser, [1], 2, least=0.4) == [2, 3]
    assert guess(guesser, [1], 2, least=0.9) == [-1, -1]


def test_only_new_tokens_count_and_rows_learn_from_each_other() -> None:
    guesser = Guesser(torch.device("cpu"))
    drawn = torch.tensor([[-1, -1, 1, 2, 3, 4], [-1, -1, 1, 2, 9, 9]])
    guesser.learn(drawn, torch.tensor([[True, False], [False, False]]))
    assert guess(guesser, [1, 2], 2) == [3, -1]
    assert guesser.totals[:PLACES].sum() == LONGEST


def test_counts_are_halved_once_the_tables_fill() -> None:
    guesser = learnt(*[[1, 2]] * 3, [7, 8])
    guesser.age(PLACES // 4 // LONGEST - 1)
    assert guess(guesser, [7], 1) == [8]
    guesser.age(1)
    assert guess(guesser, [7], 1) == [-1]
    assert guess(guesser, [1], 1, least=0.66) == [2]  # 1 of 1, and a half
    guesser.age(1)
    assert guess(guesser, [1], 1) == [2]


def test_the_number_of_guesses_follows_what_was_right_and_how_many_rows_run() -> None:
    counts = Acceptance(5)
    assert [counts.best(rows, free=240) for rows in (8, 64, 100_000)] == [
        3,
        1,
        0,
    ]  # a half, a quarter …, before any is known
    counts.add([1000, 990, 980, 970, 960, 950], [1000] * 6, kept=5850)
    assert counts.best(64, free=240) == 5
    assert counts.tokens / counts.row_steps == pytest.approx(5.85)
    for _ in range(20):
        counts.add([1000, 10, 0, 0, 0, 0], [1000] * 6, kept=0)
    assert counts.best(64, free=240) == 0
    for _ in range(100):
        counts.add([1000, 0, 0, 0, 0, 0], [1000, 0, 0, 0, 0, 0], kept=0)
    assert counts.best(64, free=240) > 0, "it never guesses again"


def test_guesses_pause_where_they_are_wrong_and_go_on_where_they_would_be_right() -> None:
    counts = Acceptance(3)
    assert counts.pays(64, free=30)
    counts.add([64, 3, 0, 0], [64, 20, 2, 0], kept=67)
    assert not counts.pays(64, free=30)
    assert counts.pays(2, free=30)
    for _ in range(20):
        counts.add([64, 18, 0, 0], [64, 20, 0, 0], kept=64)
    assert counts.pays(64, free=30)
