"""What the logs keep of each completion."""

from dataclasses import replace

import pytest
import torch

from fastgrpo.scoring.advantages import group_advantages
from fastgrpo.training.completion_records import distinct_names, records_of
from fastgrpo.training.metrics import rollout_metrics
from fastgrpo.types import Completion, Prompt, ScoredRollout


def group(row_id: int, rewards: list[list[float]], texts: list[str]) -> ScoredRollout:
    ids = torch.arange(4)
    prompt = Prompt(row_id, ids, ids.expand(3, -1), None, None, "text", None, {"task": "depth", "solution": 2}, b"jpeg")
    completions = tuple(
        Completion(row_id, i, torch.arange(i + 1), text, "stop", torch.zeros(i + 1), torch.zeros(i + 1))
        for i, text in enumerate(texts)
    )
    return ScoredRollout(prompt, completions, torch.tensor(rewards))


def test_a_record_per_completion() -> None:
    groups = [
        group(7, [[1.0, 0.0], [0.0, torch.nan]], ["so <answer>2</answer>", "wait, let me check again"]),
        group(9, [[torch.nan, torch.nan], [torch.nan, torch.nan]], ["a", "b"]),
    ]
    advantages = group_advantages(torch.cat([g.rewards for g in groups]), 2)
    records = records_of(groups, ["accuracy", "format"], advantages, thumbnails=True)
    assert [(record.row_id, record.index) for record in records] == [(7, 0), (7, 1), (9, 0), (9, 1)]
    assert [record.rewards["accuracy"] for record in records] == [1.0, 0.0, None, None]
    assert [record.rewards["format"] for record in records] == [0.0, None, None, None]
    assert [record.reward for record in records] == [1.0, 0.0, None, None]
    assert records[0].advantage > 0 > records[1].advantage
    assert [record.advantage for record in records[2:]] == [0.0, 0.0]
    assert [record.zero_std for record in records] == [False, False, True, True]
    assert [record.reflections for record in records] == [0, 2, 0, 0]
    assert [record.thumbnail for record in records] == [b"jpeg", None, b"jpeg", None]
    assert [(record.length, record.prompt_length) for record in records[:2]] == [(1, 4), (2, 4)]
    assert (records[0].task, records[0].solution) == ("depth", "2")


def test_self_corrections_are_told_where_the_options_are_known() -> None:
    texts = ["so 1. wait, so 2 <answer>2</answer>", "so 2 <answer>1</answer>", "so 2 <answer>2</answer>"]
    scored = group(7, [[1.0], [0.0], [1.0]], texts)
    advantages = group_advantages(scored.rewards, 3)
    known = replace(scored, prompt=replace(scored.prompt, columns={"solution": 2, "choices": [1, 2]}))
    records = records_of([known], ["accuracy"], advantages, thumbnails=False)
    assert [record.correction for record in records] == ["wrong to right", "right to wrong", None]
    metrics = rollout_metrics(records)
    assert metrics["self_correction/wrong_to_right"] == metrics["self_correction/right_to_wrong"] == 1 / 3
    unknown = records_of([scored], ["accuracy"], advantages, thumbnails=False)
    assert [record.has_options for record in unknown] == [False] * 3
    assert not [name for name in rollout_metrics(unknown) if name.startswith("self_correction")]


def test_thumbnails_can_be_left_out() -> None:
    groups = [group(1, [[1.0], [0.0]], ["a", "b"])]
    records = records_of(groups, ["f"], group_advantages(groups[0].rewards, 2), thumbnails=False)
    assert [record.thumbnail for record in records] == [None, None]


def test_what_reward_functions_add_is_kept_apart() -> None:
    groups = [group(1, [[1.0], [0.0]], ["a", "b"])]
    extra = {"length": ["x", "y"], "reward": torch.tensor([3, 4])}
    advantages = group_advantages(groups[0].rewards, 2)
    records = records_of(groups, ["length"], advantages, thumbnails=False, extra=extra)
    assert [(record.length, record.reward) for record in records] == [(1, 1.0), (2, 0.0)]
    assert [record.rewards["length"] for record in records] == [1.0, 0.0]
    assert [record.extra["length"] for record in records] == ["x", "y"]
    with pytest.raises(ValueError, match=r"log_extra\('one', …\) was given 3 values for 2 completions"):
        records_of(groups, ["f"], advantages, thumbnails=False, extra={"one": [1, 2, 3]})


def test_reward_functions_of_one_name_are_told_apart_once(caplog: pytest.LogCaptureFixture) -> None:
    def score(**_: object) -> list[float]:
        return []

    def score_2(**_: object) -> list[float]:
        return []

    assert distinct_names([score, score_2]) == ["score", "score_2"]
    assert not caplog.records
    assert distinct_names([score, score, score_2]) == ["score", "score_2", "score_2_2"]
    assert [
        record.getMessage().startswith("Several reward functions are called score:") for record in caplog.records
    ] == [True]
