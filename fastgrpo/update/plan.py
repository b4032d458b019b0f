"""From a scored rollout to optimizer steps: which groups each step trains on, and what each token weighs."""

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from fastgrpo.config import GRPOConfig
from fastgrpo.types import Completion, ScoredRollout, TrainingGroup
from fastgrpo.update.objective import sequence_weights


def token_masks(groups: Sequence[ScoredRollout], config: GRPOConfig) -> list[Tensor]:
    """Per completion, [C] bool: counted tokens, the end token included; truncated completions may be masked out."""

    def mask(completion: Completion) -> Tensor:
        left_out = config.mask_truncated_completions and completion.finish_reason != "stop"
        return torch.full((len(completion.token_ids),), not left_out)

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
    """One list of groups per optimizer step of one pass over the rollout (`BatchPlan.slices_per_rollout` of them).

    Args:
        advantages: [groups × G] float32.
        masks: see `token_masks`.
        total_sequences, total_tokens: completions and counted tokens of the whole rollout on all ranks; every step
            is normalised by its share of them, as in TRL.
    """
    plan, size = config.batch_plan, config.num_generations
    places = [(g, i) for g in range(len(groups)) for i in range(size)]
    # Whole groups where the sizes allow it: a prompt that two steps share is computed in both.
    unit = size if plan.prompts_per_rollout % plan.slices_per_rollout == 0 else 1
    per_step = max(1, -(-(len(places) // unit) // plan.slices_per_rollout)) * unit
    steps = []
    for start in range(0, plan.slices_per_rollout * per_step, per_step):
        chosen = places[start : start + per_step]
        weights = sequence_weights(
            torch.tensor([int(masks[g * size + i].sum()) for g, i in chosen], dtype=torch.int64),
            config.loss_type,
            max_completion_length=config.max_completion_length,
            total_sequences=total_sequences / plan.slices_per_rollout,
            total_tokens=total_tokens / plan.slices_per_rollout,
            micro_batch_size=plan.completions_per_micro_batch,
            total_micro_batches=plan.accumulation * world_size,
        )
        weight_of = dict(zip(chosen, weights.tolist(), strict=True))
        step = []
        for g, pairs in groupby(chosen, key=itemgetter(0)):
            indices = [i for _, i in pairs]
            own = [masks[g * size + i] for i in indices]
            step.append(
                TrainingGroup(
                    groups[g].prompt,
                    tuple(groups[g].completions[i] for i in indices),
                    advantages[[g * size + i for i in indices]],
                    tuple(torch.full((len(mask),), weight_of[g, i]) for i, mask in zip(indices, own, strict=True)),
                    tuple(own),
                )
            )
        steps.append(step)
    return steps
