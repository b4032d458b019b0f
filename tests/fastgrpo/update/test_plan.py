from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.config import GRPOConfig
from fastgrpo.types import Completion, Prompt, ScoredRollout, TrainingGroup
from fastgrpo.update.plan import plan_updates, token_masks

LENGTHS = [[3, 1, 5, 2], [4, 4, 1, 7], [2, 6, 3, 3], [1, 8, 2, 5]]
"""Tokens of 4 groups of 4 completions; 8 is the limit."""
ADVANTAGES = torch.linspace(-1.5, 1.5, 16)


def make_groups(lengths: list[list[int]] = LENGTHS, limit: int = 8) -> list[ScoredRollout]:
    ids = torch.arange(3)
    groups = []
    for g, counts in enumerate(lengths):
        prompt = Prompt(g, ids, ids.expand(3, -1), None, None, "")
        completions = tuple(
            Completion(g, i, torch.arange(n), "", "length" if n == limit else "stop", torch.zeros(n), torch.zeros(n))
            for i, n in enumerate(counts)
        )
        groups.append(ScoredRollout(prompt, completions, torch.zeros(len(counts), 1)))
    return groups


@pytest.fixture
def make_config(tmp_path: Path) -> Any:
    def build(**settings: Any) -> GRPOConfig:
        base = {"num_generations": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
        base |= {"max_completion_length": 8, "output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
        return GRPOConfig(**(base | settings))

    return build


def plan(
    groups: list[ScoredRollout], config: GRPOConfig, *, world_size: int = 1, share: float = 1.0, tokens: float = 0.0
) -> list[list[TrainingGroup]]:
    """Updates of a rank that holds `groups`, its `share` of all ranks' completions."""
    masks = token_masks(groups, config)
    return plan_updates(
        groups,
        ADVANTAGES[: len(masks)],
        masks,
        config,
        total_sequences=len(masks) / share,
        total_tokens=tokens or float(sum(int(mask.sum()) for mask in masks)),
        world_size=world_size,
    )


def token_losses(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def weighted_sum(step: list[TrainingGroup]) -> float:
    """Σ weight · loss over the counted tokens of an optimizer step, with a loss of each completion's own."""
    return sum(
        float((weights * mask * token_losses(len(mask), 100 * group.prompt.row_id + completion.index)).sum())
        for group in step
        for weights, mask, completion in zip(group.token_weights, group.masks, group.completions, strict=True)
    )


def losses_of(step: list[TrainingGroup]) -> list[Tensor]:
    """Per completion, the losses of its counted tokens."""
    return [
        token_losses(len(mask), 100 * group.prompt.row_id + completion.index)[mask]
        for group in step
        for mask, completion in zip(group.masks, group.completions, strict=True)
    ]


def mean_or_zero(losses: Tensor) -> float:
    return float(losses.sum()) / max(1, len(losses))


def aggregate(losses: list[Tensor], loss_type: str, *, micro_batch: int, rollout_tokens_per_step: float) -> float:
    """TRL's aggregation of one optimizer step, written down from its definitions."""
    if loss_type in ("grpo", "sapo"):
        return sum(map(mean_or_zero, losses)) / len(losses)
    if loss_type == "bnpo":
        parts = [torch.cat(losses[i : i + micro_batch]) for i in range(0, len(losses), micro_batch)]
        return sum(map(mean_or_zero, parts)) / len(parts)
    total = float(torch.cat(losses).sum())
    if loss_type == "dr_grpo":
        return total / (len(losses) * 8)
    if loss_type == "luspo":
        return total / len(losses)
    return total / rollout_tokens_per_step  # dapo, cispo, vespo


TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
BATCHES = [
    {},
    # several micro-batches to a group, several groups to a micro-batch
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
    {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    {"per_device_train_batch_size": 2, "batch_unit": "prompts", "gradient_accumulation_steps": 2},
    # one rollout feeds two and four optimizer steps
    {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
    {"gradient_accumulation_steps": 1, "steps_per_generation": 4},
    # an optimizer step takes half a group
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "steps_per_generation": 8},
    # an optimizer step takes slices of two rollouts, or whole ones
    {"gradient_accumulation_steps": 3, "steps_per_generation": 4},
    {"gradient_accumulation_steps": 8, "steps_per_generation": 4},
]


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize("loss_type", TYPES)
def test_weights_reproduce_each_aggregation(
    make_config: Any, loss_type: str, batch: dict[str, Any], mask_truncated: bool
) -> None:
    config = make_config(loss_type=loss_type, mask_truncated_completions=mask_truncated, **batch)
    steps, sizes = plan(make_groups(), config), config.batch_plan
    assert len(steps) == sizes.slices_per_rollout
    taken = [
        (group.prompt.row_id, completion.index) for step in steps for group in step for completion in group.completions
    ]
    assert taken == [(row, index) for row in range(4) for index in range(4)]
    rollout_tokens = sum(int(mask.sum()) for step in steps for group in step for mask in group.masks)
    for step in steps:
        expected = aggregate(
            losses_of(step),
            loss_type,
            micro_batch=sizes.completions_per_micro_batch,
            rollout_tokens_per_step=rollout_tokens / len(steps),
        )
        assert weighted_sum(step) * sizes.slices_per_step == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("loss_type", TYPES)
def test_two_ranks_add_up_to_one(make_config: Any, loss_type: str) -> None:
    """The same 16 completions in micro-batches of 4, on one rank and on two."""
    groups = make_groups()
    one = plan(groups, make_config(loss_type=loss_type))
    config = make_config(loss_type=loss_type, gradient_accumulation_steps=2)
    tokens = float(sum(map(sum, LENGTHS)))
    two = [plan(half, config, world_size=2, share=0.5, tokens=tokens) for half in (groups[:2], groups[2:])]
    assert sum(weighted_sum(steps[0]) for steps in two) == pytest.approx(weighted_sum(one[0]), rel=1e-5)


def test_completions_keep_their_advantages(make_config: Any) -> None:
    steps = plan(make_groups(), make_config(gradient_accumulation_steps=2, steps_per_generation=4))
    assert torch.equal(torch.cat([group.advantages for step in steps for group in step]), ADVANTAGES)
    for step in steps:
        for group in step:
            lengths = [len(completion.token_ids) for completion in group.completions]
            assert [len(weights) for weights in group.token_weights] == lengths
            assert [len(mask) for mask in group.masks] == lengths


def test_truncated_completions_are_masked_when_asked(make_config: Any) -> None:
    groups = make_groups()
    kept = token_masks(groups, make_config())
    assert all(bool(mask.all()) for mask in kept)
    masks = token_masks(groups, make_config(mask_truncated_completions=True))
    assert [len(mask) for mask in masks] == [length for counts in LENGTHS for length in counts]
    assert [bool(mask.any()) for mask in masks] == [length < 8 for counts in LENGTHS for length in counts]


def test_all_completions_truncated(make_config: Any) -> None:
    """Nothing counts, and no weight is infinite or NaN."""
    config = make_config(mask_truncated_completions=True, num_generations=2, per_device_train_batch_size=2)
    for loss_type in TYPES:
        config.loss_type = loss_type
        [step] = plan(make_groups([[8, 8], [8, 8]]), config, tokens=0.0)
        assert all(bool(weights.isfinite().all()) for group in step for weights in group.token_weights)
        assert weighted_sum(step) == 0


def test_skipped_rows_leave_steps_with_fewer_groups(make_config: Any) -> None:
    config = make_config(gradient_accumulation_steps=1, steps_per_generation=4)
    assert [len(step) for step in plan(make_groups(LENGTHS[:3]), config)] == [1, 1, 1, 0]
    assert [len(step) for step in plan([], config)] == [0, 0, 0, 0]
