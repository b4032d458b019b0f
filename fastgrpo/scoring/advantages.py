"""Group-relative advantages: each completion's reward compared with the others of its group."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ZERO_STD = 1e-8
"""A group whose rewards have a std of at most this has no gradient; as in TRL, torch.isclose to 0."""


AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
"""How several reward functions become one advantage."""


@dataclass(frozen=True)
class Advantages:
    """Advantages of N groups of G completions, and the figures they come from."""

    advantages: Tensor
    """[N·G] float32; 0 where every reward function abstained."""
    rewards: Tensor
    """[N·G] float32, weighted sum over the reward functions; NaN where every one abstained."""
    group_std: Tensor
    """[N] float32, with Bessel's correction; 0 where fewer than two completions have a reward. Where advantages are
    divided by the batch's, that."""


def group_advantages(
    rewards: Tensor,
    num_generations: int,
    weights: Sequence[float] | Tensor | None = None,
    scale_rewards: str | bool = "group",
    *,
    aggregation: str = "sum_then_normalize",
    gather: Callable[[Tensor], Tensor] = lambda values: values,
) -> Advantages:
    """(reward − mean of the group) / (std + 1e-4): GRPO (arXiv 2402.03300), abstentions left out.

    With "normalize_then_sum" (GDPO, arXiv 2601.05242) this is done to each reward function's column by group; their
    weighted sum, normalised so over the batch, is the advantage.

    Args:
        rewards: [N·G, F], a column per reward function, groups contiguous; NaN where a function abstained.
        weights: [F], all 1 if None.
        scale_rewards: "group", "batch" or "none", the std to divide by; True is "group", False "none". Without
            meaning for normalize_then_sum.
        aggregation: "sum_then_normalize" or "normalize_then_sum".
        gather: gives a [N·G] tensor's values of all ranks, for the batch's mean and std; called by all ranks, or none.

    Raises:
        ValueError: unknown `scale_rewards` or `aggregation`, not one weight per column, or rows that are not whole
            groups.
    """
    scale = scale_rewards
    if isinstance(scale, bool):
        scale = "group" if scale else "none"
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale_rewards={scale_rewards!r} is not valid: use group, batch or none.")
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"multi_objective_aggregation={aggregation!r} is not valid: use {' or '.join(AGGREGATIONS)}.")
    count, functions = rewards.shape
    if num_generations < 1 or count % num_generations:
        raise ValueError(f"{count} rows of rewards are not whole groups of num_generations={num_generations}.")
    weights = torch.ones(functions) if weights is None else torch.as_tensor(weights)
    if weights.shape != (functions,):
        raise ValueError(
            f"reward_weights has {weights.numel()} values for {functions} reward functions: pass one each."
        )

    rewards = rewards.double()  # so that equal rewards are exactly their mean
    total = _weighted_sum(rewards, weights)  # [N·G]
    grouped = total.view(-1, num_generations)
    group_std = nan_std(grouped)
    if aggregation == "normalize_then_sum":
        columns = rewards.view(-1, num_generations, functions).transpose(1, 2)  # [N, F, G]
        columns = _centred(columns) / (nan_std(columns)[..., None] + 1e-4)
        summed = _weighted_sum(columns.transpose(1, 2).reshape(count, functions), weights)
        everywhere = gather(summed)
        group_std = nan_std(everywhere).expand(len(grouped))
        advantages = (summed - everywhere.nanmean()) / (nan_std(everywhere) + 1e-4)
    else:
        advantages = _centred(grouped).flatten()
        if scale == "batch":
            group_std = nan_std(gather(total)).expand(len(grouped))
        if scale != "none":
            advantages = advantages / (group_std.repeat_interleave(num_generations) + 1e-4)
    return Advantages(advantages.nan_to_num(0.0).float(), total.float(), group_std.float())


def _weighted_sum(columns: Tensor, weights: Tensor) -> Tensor:
    """[M, F] to [M]; NaN where every function abstained."""
    return (columns * weights.to(columns)).nansum(dim=1).masked_fill(columns.isnan().all(dim=1), torch.nan)


def _centred(values: Tensor) -> Tensor:
    return values - values.nanmean(dim=-1, keepdim=True)


def nan_std(values: Tensor) -> Tensor:
    """Standard deviation (Bessel) over the last dimension, NaN left out; 0 for fewer than two values."""
    count = (~values.isnan()).sum(dim=-1)
    return (_centred(values).nan_to_num(0.0).square().sum(dim=-1) / (count - 1).clamp(min=1)).sqrt()
