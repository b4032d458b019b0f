"""Reward functions that are called group by group, in threads, while other groups are drawn."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastgrpo.rewards import per_group
from fastgrpo.scoring.reward_calls import AT_ONCE
from fastgrpo.scoring.rewards import EarlyCalls, reward_name, score
from fastgrpo.types import Completion, Prompt, Rollout

PROMPT = Prompt(0, torch.arange(3), torch.zeros(3, 3, dtype=torch.long), None, None, "prompt")
NAMES = {"trainer_state": None, "log_extra": None, "log_metric": None}


def group(row: int, texts: Sequence[str], **columns: Any) -> Rollout:
    none = torch.zeros(0)
    ended = (Completion(row, i, none.long(), text, "stop", none, none) for i, text in enumerate(texts))
    return Rollout(replace(PROMPT, row_id=row, columns=columns), tuple(ended))


GROUPS = [group(7, ["a", "bb"], level=1), group(3, ["ccc", ""]), group(5, ["d", "e"], kind="x")]


def started(functions: Sequence[Any], groups: Sequence[Rollout] = GROUPS) -> EarlyCalls:
    """Their calls, the last group's first."""
    early = EarlyCalls(functions, NAMES, ("level", "kind"))
    for one in reversed(groups):
        early.start(one)
    return early


def logging_lengths(completions: list[str], level: Any, kind: Any, log_extra: Any, log_metric: Any, **_: Any) -> Any:
    log_metric("longest", max(map(len, completions)))
    log_extra("kind", kind)
    if level[0]:
        log_extra("level", torch.tensor(level))
    return [None if text == "" else float(len(text)) for text in completions]


@pytest.mark.parametrize("is_early", [True, False])
def test_rewards_and_logs_are_in_the_groups_order_whenever_they_were_called(is_early: bool) -> None:
    logged: list[Any] = []
    functions = [lambda completions, **_: [0.0] * 6, per_group(logging_lengths)]
    early = started(functions) if is_early else None
    told = {"log_extra": lambda *a: logged.append(a), "log_metric": lambda *a: logged.append(a)}
    rewards = score(GROUPS, functions, **told, early=early)
    assert torch.equal(rewards.nan_to_num(-1), torch.tensor([[0, 1], [0, 2], [0, 3], [0, -1], [0, 1], [0, 1.0]]))
    kinds, levels = [None, None, None, None, "x", "x"], [1, 1, None, None, None, None]
    assert logged == [("kind", kinds), ("level", levels), ("longest", 2.0)]


def test_a_call_sees_one_group_with_the_columns_of_all() -> None:
    seen = []
    score(GROUPS, [per_group(lambda **given: seen.append(given) or [0.0] * 2)])
    seen.sort(key=lambda given: given["completions"])
    assert [given["completions"] for given in seen] == [["a", "bb"], ["ccc", ""], ["d", "e"]]
    assert [(given["level"], given["kind"]) for given in seen] == [
        ([1, 1], [None, None]), ([None, None], [None, None]), ([None, None], ["x", "x"])
    ]  # fmt: skip


def failing(completions: list[str], **_: Any) -> Any:
    if "ccc" in completions:
        raise KeyError("first")
    if "d" in completions:
        return ["good", 1.0]
    return [1.0, 2.0]


@pytest.mark.parametrize("early", [started, lambda functions: None])
@pytest.mark.parametrize(
    ("function", "told"),
    [
        (failing, "'failing' failed on 2 completions: KeyError: 'first'"),
        (lambda completions, **_: [1.0] * len(completions[0]), "returned 1 rewards for 2 completions"),
        (lambda completions, **_: [1.0, completions[0]], "returned 'a' for completion 1 of row 7"),
        (lambda log_extra, **_: log_extra("x", [1]), r"log_extra\('x', …\) was given 1 values: give one each"),
    ],
)
def test_the_first_groups_failure_is_told(early: Callable[..., Any], function: Any, told: str) -> None:
    functions = [per_group(function)]
    with pytest.raises(ValueError, match=told):
        score(GROUPS, functions, early=early(functions))


def test_calls_run_together_but_no_more_than_at_once() -> None:
    together, running, most = threading.Barrier(AT_ONCE), [], []

    def meets(completions: list[str], **_: Any) -> list[float]:
        running.append(1)
        most.append(len(running))
        together.wait(60)
        running.pop()
        return [float(completions[0])]

    groups = [group(i, [str(i)]) for i in range(2 * AT_ONCE)]
    assert score(groups, [per_group(meets)])[:, 0].tolist() == list(range(2 * AT_ONCE))
    assert max(most) <= AT_ONCE


def test_groups_that_were_replaced_are_scored_anew() -> None:
    function = per_group(lambda completions, **_: [float(len(text)) for text in completions])
    early = started([function])
    others = [group(7, ["a longer one", "b"]), *GROUPS[1:]]
    assert score(others, [function], early=early)[:2, 0].tolist() == [12.0, 1.0]


def test_a_marked_function_keeps_its_name_and_is_called_as_any_other() -> None:
    marked = per_group(failing)
    assert reward_name(marked) == "failing"
    assert marked(completions=["a"]) == [1.0, 2.0]
