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
    given = group_advantages(rewards, 2, scale_rewards="batch", batch_std=torch.tensor(2.0))
    torch.testing.assert_close(given.advantages, centred / (2.0 + 1e-4))


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
    with pytest.raises(ValueError, match="3 values for 1 reward functions"):
        group_advantages(column(1.0, 0.0), 2, [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"3 rows.*num_generations=2"):
        group_advantages(column(1.0, 0.0, 1.0), 2)
