"""Group-relative advantages: each completion's reward compared with the others of its group."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ZERO_STD = 1e-8
"""A group whose rewards have a std of at most this has no gradient; as in TRL, torch.isclose to 0."""


@dataclass(frozen=True)
class Advantages:
    """Advantages of N groups of G completions, and the figures they come from."""

    advantages: Tensor
    """[N·G] float32; 0 where every reward function abstained."""
    rewards: Tensor
    """[N·G] float32, weighted sum over the reward functions; NaN where every one abstained."""
    group_std: Tensor
    """[N] float32, with Bessel's correction; 0 where fewer than two completions have a reward."""


def group_advantages(
    rewards: Tensor,
    num_generations: int,
    weights: Sequence[float] | Tensor | None = None,
    scale_rewards: str | bool = "group",
    *,
    batch_std: Tensor | None = None,
) -> Advantages:
    """(reward − mean of the group) / (std + 1e-4): GRPO (arXiv 2402.03300), abstentions left out.

    Args:
        rewards: [N·G, F], a column per reward function, groups contiguous; NaN where a function abstained.
        weights: [F], all 1 if None.
        scale_rewards: "group", "batch" or "none", the std to divide by; True is "group", False "none".
        batch_std: scalar, the std over all ranks' rewards; None: over those given. Used by "batch" alone.

    Raises:
        ValueError: unknown `scale_rewards`, not one weight per column, or rows that are not whole groups.
    """
    scale = scale_rewards
    if isinstance(scale, bool):
        scale = "group" if scale else "none"
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale_rewards={scale_rewards!r} is not valid: use group, batch or none.")
    count, functions = rewards.shape
    if num_generations < 1 or count % num_generations:
        raise ValueError(f"{count} rows of rewards are not whole groups of num_generations={num_generations}.")
    weights = torch.ones(functions) if weights is None else torch.as_tensor(weights)
    if weights.shape != (functions,):
        raise ValueError(
            f"reward_weights has {weights.numel()} values for {functions} reward functions: pass one each."
        )

    rewards = rewards.double()  # so that equal rewards are exactly their mean
    abstained = rewards.isnan().all(dim=1)
    total = (rewards * weights.to(rewards)).nansum(dim=1).masked_fill(abstained, torch.nan)  # [N·G]
    grouped = total.view(-1, num_generations)
    centred = grouped - grouped.nanmean(dim=1, keepdim=True)  # [N, G]
    group_std = nan_std(grouped)
    if scale == "group":
        centred = centred / (group_std[:, None] + 1e-4)
    elif scale == "batch":
        centred = centred / ((nan_std(total) if batch_std is None else batch_std.to(total)) + 1e-4)
    advantages = centred.flatten().nan_to_num(0.0)
    return Advantages(advantages.float(), total.float(), group_std.float())


def nan_std(values: Tensor) -> Tensor:
    """Standard deviation (Bessel) over the last dimension, NaN left out; 0 for fewer than two values."""
    centred = (values - values.nanmean(dim=-1, keepdim=True)).nan_to_num(0.0)
    count = (~values.isnan()).sum(dim=-1)
    return (centred.square().sum(dim=-1) / (count - 1).clamp(min=1)).sqrt()
