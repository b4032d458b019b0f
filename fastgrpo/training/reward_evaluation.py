"""Rewards on held-out rows: what `trainer.evaluate()` measures, sampled and scored as in training."""

from collections.abc import Sequence

from torch import Tensor
from transformers import TrainerState

from fastgrpo.config import GRPOConfig
from fastgrpo.data.prompts import PromptBuilder, PromptCollator
from fastgrpo.data.row_dataset import RowDataset
from fastgrpo.scoring.advantages import group_advantages
from fastgrpo.scoring.rewards import RewardFunction, score
from fastgrpo.training.completion_records import CompletionRecord, records_of
from fastgrpo.training.setup import sampling_params
from fastgrpo.types import Engine, ScoredRollout


def score_rows(
    rows: RowDataset,
    mine: Sequence[int],
    engine: Engine,
    builder: PromptBuilder,
    config: GRPOConfig,
    reward_functions: Sequence[RewardFunction],
    reward_names: Sequence[str],
    reward_weights: Tensor,
    state: TrainerState,
) -> list[CompletionRecord]:
    """Records of completions to the rows `mine`, `per_device_eval_batch_size` of them at a time.

    The engine must be synced.
    """
    size, at_once = config.num_generations_eval or config.num_generations, config.per_device_eval_batch_size
    collate = PromptCollator(rows, builder)
    records: list[CompletionRecord] = []
    for start in range(0, len(mine), at_once):
        prompts = collate([rows[i] for i in mine[start : start + at_once]]).prompts
        drawn = list(engine.generate(prompts, size, sampling_params(config), step=start))
        rewards = score(drawn, reward_functions, trainer_state=state, nan_rewards=config.nan_rewards)
        rollouts = [ScoredRollout(*one, columns) for one, columns in zip(drawn, rewards.split(size), strict=False)]
        advantages = group_advantages(rewards, size, reward_weights, "none")
        records += records_of(rollouts, reward_names, advantages, thumbnails=False)
    return records
