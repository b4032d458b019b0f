"""From a scored rollout to optimizer steps: which groups each step trains on, and what each token weighs."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from fastgrpo.config import GRPOConfig
from fastgrpo.types import Completion, Rollout, ScoredRollout, TrainingGroup
from fastgrpo.update.objective import sequence_weights


def token_masks(groups: Sequence[Rollout | ScoredRollout], config: GRPOConfig) -> list[Tensor]:
    """Per completion, [C] bool: the counted tokens that the policy wrote; truncated completions may be masked out."""

    def mask(completion: Completion) -> Tensor:
        left_out = config.mask_truncated_completions and completion.finish_reason != "stop"
        counted = torch.full((len(completion.token_ids),), not left_out)
        return counted if completion.own_tokens is None else counted & completion.own_tokens

    return [mask(completion) for group in groups for completion in group.completions]


def plan_updates(
    groups: Sequence[ScoredRollout],
    advantages: Tensor,
    masks: Sequence[Tensor],
    config: GRPOConfig,
    *,
    total_sequences: float,
    total_tokens: float,
    world_size: int,
) -> list[list[TrainingGroup]]:
    """The groups of each slice of a rollout (`BatchPlan.slices_per_rollout` of them), weighted for their steps.

    Args:
        advantages: [groups × G] float32.
        masks: see `token_masks`.
        total_sequences, total_tokens: completions and counted tokens of the whole rollout on all ranks; every step
            is normalised by its share of them, as in TRL.
    """
    plan, size = config.batch_plan, config.num_generations
    steps_per_rollout = plan.micro_batches_per_rollout / plan.accumulation
    places = [(g, i) for g in range(len(groups)) for i in range(size)]
    # Whole groups where the sizes allow it: a prompt that two slices share is computed in both.
    unit = size if plan.prompts_per_rollout % plan.slices_per_rollout == 0 else 1
    per_slice = max(1, -(-(len(places) // unit) // plan.slices_per_rollout)) * unit
    slices = []
    for start in range(0, plan.slices_per_rollout * per_slice, per_slice):
        chosen = places[start : start + per_slice]
        numbers = [g * size + i for g, i in chosen]
        slices.append(
            weighted_groups(
                [
                    Rollout(groups[g].prompt, tuple(groups[g].completions[i] for _, i in pairs))
                    for g, pairs in groupby(chosen, key=itemgetter(0))
                ],
                advantages[numbers],
                [masks[n] for n in numbers],
                config,
                total_sequences=total_sequences / steps_per_rollout,
                total_tokens=total_tokens / steps_per_rollout,
                micro_batch_size=plan.completions_per_micro_batch,
                total_micro_batches=plan.accumulation * world_size,
            )
        )
    return slices


def weighted_groups(
    groups: Sequence[Rollout | ScoredRollout],
    advantages: Tensor,
    masks: Sequence[Tensor],
    config: GRPOConfig,
    *,
    total_sequences: float,
    total_tokens: float,
    micro_batch_size: int,
    total_micro_batches: float,
) -> list[TrainingGroup]:
    """One optimizer step's groups, with what each token weighs: see `objective.sequence_weights`.

    Args:
        advantages: [completions of `groups`] float32.
        masks: see `token_masks`.
    """
    counts = torch.tensor([int(mask.sum()) for mask in masks], dtype=torch.int64)
    weights = sequence_weights(
        counts,
        config.loss_type,
        max_completion_length=config.max_completion_length,
        total_sequences=total_sequences,
        total_tokens=total_tokens,
        micro_batch_size=micro_batch_size,
        total_micro_batches=total_micro_batches,
    ).tolist()
    per_token = [torch.full((len(mask),), weight) for mask, weight in zip(masks, weights, strict=True)]
    weighted, first = [], 0
    for group in groups:
        own = slice(first, first + len(group.completions))
        weighted.append(
            TrainingGroup(group.prompt, group.completions, advantages[own], tuple(per_token[own]), tuple(masks[own]))
        )
        first = own.stop
    return weighted


def reweighted(groups: list[TrainingGroup], factor: float) -> list[TrainingGroup]:
    """The groups of an epoch's last step, which may have fewer micro-batches: each of these then weighs more."""
    if factor == 1:
        return groups
    return [replace(one, token_weights=tuple(factor * weights for weights in one.token_weights)) for one in groups]
