"""Group-relative advantages against the formula, and where rewards are missing."""

import math
import statistics

import pytest
import torch

from fastgrpo.scoring.advantages import group_advantages

NAN = math.nan


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values).unsqueeze(1)


def test_two_groups_by_hand() -> None:
    rewards = column(1, 0, 0, 1, 0.5, 0.25, 0.0, 1.0)
    result = group_advantages(rewards, 4)
    expected = []
    for values in rewards.view(2, 4).tolist():
        mean, std = statistics.mean(values), statistics.stdev(values)
        expected += [(value - mean) / (std + 1e-4) for value in values]
    torch.testing.assert_close(result.advantages, torch.tensor(expected))
    torch.testing.assert_close(result.rewards, rewards.squeeze(1))
    torch.testing.assert_close(
        result.group_std, torch.tensor([statistics.stdev([1, 0, 0, 1]), statistics.stdev([0.5, 0.25, 0, 1])])
    )
    assert result.advantages.dtype == result.rewards.dtype == result.group_std.dtype == torch.float32


def test_better_completions_get_higher_advantages() -> None:
    advantages = group_advantages(column(0.0, 1.0, 2.0), 3).advantages
    assert advantages[0] < 0 < advantages[2]
    assert advantages[1] == 0


def test_weights_are_applied_and_summed() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [NAN, 1.0], [1.0, NAN]])
    result = group_advantages(rewards, 4, [0.7, 0.3])
    torch.testing.assert_close(result.rewards, torch.tensor([0.7, 0.3, 0.3, 0.7]), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        group_advantages(rewards, 4, torch.tensor([0.7, 0.3])).advantages, result.advantages, atol=1e-6, rtol=0
    )
    torch.testing.assert_close(group_advantages(rewards, 4).rewards, torch.ones(4))


def test_unscored_completions_get_zero_and_leave_the_baseline() -> None:
    scored = group_advantages(column(1.0, 0.0, 1.0), 3)
    result = group_advantages(column(1.0, NAN, 0.0, 1.0), 4)
    torch.testing.assert_close(result.advantages[[0, 2, 3]], scored.advantages)
    assert result.advantages[1] == 0
    assert result.rewards[1].isnan()
    torch.testing.assert_close(result.group_std, scored.group_std)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_with_one_valid_reward_or_none_have_no_advantage(scale: str) -> None:
    result = group_advantages(column(NAN, 1.0, NAN, NAN), 2, scale_rewards=scale)
    assert result.advantages.tolist() == [0, 0, 0, 0]
    assert result.group_std.tolist() == [0, 0]


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 0.3, 1e6])
@pytest.mark.parametrize("size", [2, 6, 7, 8])
def test_equal_rewards_give_exactly_zero(value: float, size: int) -> None:
    result = group_advantages(torch.full((size, 1), value), size)
    assert (result.advantages == 0).all()


def test_scaling() -> None:
    rewards = column(1.0, 0.0, 3.0, 3.0)
    centred = torch.tensor([0.5, -0.5, 0.0, 0.0])
    batch_std = statistics.stdev([1.0, 0.0, 3.0, 3.0])
    none = group_advantages(rewards, 2, scale_rewards="none")
    torch.testing.assert_close(none.advantages, centred)
    by_batch = group_advantages(rewards, 2, scale_rewards="batch")
    torch.testing.assert_close(by_batch.advantages, centred / (batch_std + 1e-4))
    assert by_batch.group_std.tolist() == pytest.approx([batch_std] * 2)
    everywhere = torch.tensor([0.0, 4.0], dtype=torch.float64)
    given = group_advantages(rewards, 2, scale_rewards="batch", gather=lambda values: everywhere)
    torch.testing.assert_close(given.advantages, centred / (math.sqrt(8) + 1e-4))


def test_each_reward_normalised_before_they_are_summed() -> None:
    rewards = torch.tensor([[1.0, 10], [0, NAN], [4, 30], [2, 20], [NAN, NAN], [NAN, 7]])
    first = [math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(0.5), -math.sqrt(0.5), NAN, 0.0]  # z-scores of pairs
    second = [0.0, NAN, math.sqrt(0.5), -math.sqrt(0.5), NAN, 0.0]
    sums = [sum(part for part in (x, 2 * y) if part == part) for x, y in zip(first, second, strict=True)]
    known = [sums[i] for i in (0, 1, 2, 3, 5)]
    mean, std = statistics.fmean(known), statistics.stdev(known)
    expected = [(total - mean) / std for total in sums]
    expected[4] = 0.0  # every function abstained
    result = group_advantages(rewards, 2, [1.0, 2.0], aggregation="normalize_then_sum")
    assert result.advantages.tolist() == pytest.approx(expected, abs=1e-3)
    assert result.rewards[:4].tolist() == [21, 0, 64, 42]
    assert result.rewards[4].isnan()


def test_the_batch_of_normalised_sums_is_that_of_all_ranks() -> None:
    rewards = column(1.0, 0.0, 3.0, 1.0)
    result = group_advantages(
        rewards, 2, aggregation="normalize_then_sum", gather=lambda mine: torch.cat([mine, mine + 1])
    )
    scores = [math.sqrt(0.5), -math.sqrt(0.5)] * 2
    everywhere = [*scores, *(score + 1 for score in scores)]
    expected = [(score - statistics.fmean(everywhere)) / statistics.stdev(everywhere) for score in scores]
    assert result.advantages.tolist() == pytest.approx(expected, abs=1e-3)


def test_trls_booleans() -> None:
    rewards = column(1.0, 0.0, 3.0, 3.0)
    for boolean, name in ((True, "group"), (False, "none")):
        expected = group_advantages(rewards, 2, scale_rewards=name).advantages
        assert torch.equal(group_advantages(rewards, 2, scale_rewards=boolean).advantages, expected)


def test_no_groups() -> None:
    result = group_advantages(torch.zeros(0, 2), 4)
    assert result.advantages.shape == result.rewards.shape == result.group_std.shape == (0,)


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scale_rewards='std'.*group, batch or none"):
        group_advantages(column(1.0, 0.0), 2, scale_rewards="std")
    with pytest.raises(ValueError, match="multi_objective_aggregation='sum' is not valid"):
        group_advantages(column(1.0, 0.0), 2, aggregation="sum")
    with pytest.raises(ValueError, match="3 values for 1 reward functions"):
        group_advantages(column(1.0, 0.0), 2, [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"3 rows.*num_generations=2"):
        group_advantages(column(1.0, 0.0, 1.0), 2)
