"""Gold answers as data sets write them."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from fastgrpo.scoring.golds import check_gold, gold_text, option_texts
from fastgrpo.types import RowError

READ = [
    ("left", "left"),
    (" left\n", "left"),
    (3, "3"),
    (3.5, "3.5"),
    (True, "true"),
    ([3], "3"),
    (["left"], "left"),
    (np.int64(3), "3"),
    (np.float32(0.5), "0.5"),
    (np.array([3]), "3"),
    (torch.tensor(3), "3"),
    ("<answer> 3 </answer>", "3"),
    ("<think>2 + 1</think>\n<answer>(A)</answer>", "(A)"),
    ("2 and 1 make three. So $x = \\boxed{3}$.", "3"),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("first \\boxed{1}, then \\boxed{2}", "2"),
    ("\\boxed{1", "\\boxed{1"),
    ("48 / 2 = <<48/2=24>>24\n48 + 24 = 72\n#### 72", "72"),
    ("$5$", "$5$"),
]


@pytest.mark.parametrize(("value", "text"), READ)
def test_golds_that_can_be_read(value: Any, text: str) -> None:
    assert gold_text(value) == text


@pytest.mark.parametrize(
    "value",
    [
        *(None, "", "  ", [], [1, 2], [None], [[3]], {"a": 1}, b"3", math.nan, math.inf),
        *("<answer></answer>", "<answer>3", "<answer>3</answer><answer>4</answer>", "\\boxed{}"),
    ],
    ids=repr,
)
def test_golds_that_no_answer_can_match(value: Any) -> None:
    with pytest.raises(RowError, match=r"solution is .*; wanted one"):
        gold_text(value)


def test_options() -> None:
    assert option_texts([1, 2.5, " three "]) == option_texts(("1", "2.5", "three")) == ["1", "2.5", "three"]
    assert option_texts(np.array([1, 2])) == ["1", "2"]
    for bad in ("A, B", {"A": 1}, 3, ["a", None], ["a", " "], [["a"]]):
        with pytest.raises(RowError, match=r"choices is .*; wanted a"):
            option_texts(bad)


@pytest.mark.parametrize(
    ("solution", "choices"),
    [
        (3, None),
        ("(B)", ["x", "y"]),
        ("y", ["x", "y"]),
        ("E", ["E", "F"]),
        (None, ["x", "y"]),
        ("E", None),
        ("7", [1, 2]),
    ],
)
def test_golds_and_options_that_go_together(solution: Any, choices: Any) -> None:
    check_gold(solution, choices)


@pytest.mark.parametrize(
    ("solution", "choices"), [("E", [1, 2, 3, 4]), ("(C)", ["x", "y"]), (None, "x, y"), ([], None)]
)
def test_golds_and_options_that_do_not(solution: Any, choices: Any) -> None:
    with pytest.raises(RowError):
        check_gold(solution, choices)
