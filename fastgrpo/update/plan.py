"""From a scored rollout to optimizer steps: which groups each step trains on, and what each token weighs."""

from collections.abc import Sequence

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
    groups_per_step = max(1, -(-len(groups) // plan.slices_per_rollout))
    steps = []
    for i in range(plan.slices_per_rollout):
        chosen = range(i * groups_per_step, min((i + 1) * groups_per_step, len(groups)))
        step_masks = [masks[n] for g in chosen for n in range(g * size, (g + 1) * size)]
        weights = sequence_weights(
            torch.tensor([int(mask.sum()) for mask in step_masks], dtype=torch.int64),
            config.loss_type,
            max_completion_length=config.max_completion_length,
            total_sequences=total_sequences / plan.slices_per_rollout,
            total_tokens=total_tokens / plan.slices_per_rollout,
            micro_batch_size=plan.completions_per_micro_batch,
            total_micro_batches=plan.accumulation * world_size,
        ).tolist()
        per_token = [torch.full((len(mask),), weight) for mask, weight in zip(step_masks, weights, strict=True)]
        steps.append(
            [
                TrainingGroup(
                    groups[g].prompt,
                    groups[g].completions,
                    advantages[g * size : (g + 1) * size],
                    tuple(per_token[k * size : (k + 1) * size]),
                    tuple(step_masks[k * size : (k + 1) * size]),
                )
                for k, g in enumerate(chosen)
            ]
        )
    return steps
