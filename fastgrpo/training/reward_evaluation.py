"""What `trainer.evaluate()` measures on held-out rows: rewards, lengths and the loss, sampled as in training."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerControl
from transformers.trainer_utils import speed_metrics

from fastgrpo.data.prompts import PromptCollator
from fastgrpo.data.row_dataset import RowDataset
from fastgrpo.scoring.advantages import Advantages, group_advantages
from fastgrpo.training.completion_records import CompletionRecord, records_of
from fastgrpo.training.metrics import rollout_metrics, update_metrics
from fastgrpo.training.rows import resolve_held_out
from fastgrpo.training.setup import sampling_params
from fastgrpo.training.trl_surface import TRLSurface
from fastgrpo.types import ScoredRollout, TrainingGroup, Updater
from fastgrpo.update.plan import token_masks, weighted_groups

OF_UPDATE = ("loss", "entropy", "kl")
"""Figures of an update that mean something where nothing is trained: the ratio to the drawing policy is 1."""


class RewardEvaluation(TRLSurface):
    """A trainer that evaluates by its rewards."""

    updater: Updater
    reward_weights: Tensor
    held_out: Any
    """The rows of `eval_dataset`: `RowDataset`, a dict of several, or None."""

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean rewards and lengths, the loss, its KL term and the entropy on held-out rows, under TRL's names.

        Args:
            eval_dataset: rows, several sets by name, or the name of one of the trainer's; default all of the trainer's.

        Returns:
            The figures; of several sets, each under `PREFIX_NAME_`.

        Raises:
            ValueError: no rows.
        """
        rows = self.held_out if eval_dataset is None else eval_dataset
        if isinstance(rows, str) and isinstance(self.held_out, dict):
            rows = self.held_out[rows]
        rows = resolve_held_out(rows, self.config, self.reward_functions)
        if rows is None:
            raise ValueError("eval_dataset is missing: pass one to the trainer or to evaluate().")
        if isinstance(rows, Mapping):
            by_name = [self.evaluate(one, ignore_keys, f"{metric_key_prefix}_{name}") for name, one in rows.items()]
            return {name: value for metrics in by_name for name, value in metrics.items()}
        self.model.eval()
        start = time.time()
        at_once = self.config.per_device_eval_batch_size * self.accelerator.num_processes
        steps = math.ceil(len(rows) / at_once)
        figures = self._figures(rows, steps) | self.step_log.eval_line()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        samples = len(rows) * self.num_generations_eval
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=samples, num_steps=steps)
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _figures(self, rows: RowDataset, steps: int) -> dict[str, float]:
        """Over `steps` batches of `per_device_eval_batch_size` prompts on each rank, all ranks together."""
        self.engine.sync()
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        mine, at_once = range(rank, len(rows), ranks), self.config.per_device_eval_batch_size
        collate, size = PromptCollator(rows, self.builder), self.num_generations_eval
        records: list[CompletionRecord] = []
        of_update: list[tuple[int, dict[str, float]]] = []
        for start in range(0, steps * at_once, at_once):
            prompts = collate([rows[i] for i in mine[start : start + at_once]]).prompts
            rollouts = self.engine.generate(prompts, size, sampling_params(self.config), step=start)
            drawn = self.drawn(rollouts, prompts)
            rewards = self.rewards_of(drawn)
            scored = [ScoredRollout(*one, columns) for one, columns in zip(drawn, rewards.split(size), strict=False)]
            advantages = self.advantages_of(rewards, size)
            records += records_of(scored, self.reward_names, advantages, thumbnails=False)
            count = sum(gather_object([len(scored)]))
            of_update.append((count, self._of_update(scored, advantages)))
        return rollout_metrics(gather_object(records)) | _means(of_update)

    def advantages_of(self, rewards: Tensor, size: int) -> Advantages:
        """Group-relative advantages of groups of `size`, from rewards [completions, F]; on all ranks together."""
        return group_advantages(
            rewards,
            size,
            self.reward_weights,
            self.config.scale_rewards,
            aggregation=self.config.multi_objective_aggregation,
            gather=lambda values: torch.tensor(gather_object(values.tolist()), dtype=torch.float64),
        )

    def _of_update(self, scored: Sequence[ScoredRollout], advantages: Advantages) -> dict[str, float]:
        """Loss, KL and entropy of one batch, as an update on it would have them."""
        config = self.config
        masks = token_masks(scored, config)
        totals = torch.tensor([len(masks), sum(int(mask.sum()) for mask in masks)], device=self.accelerator.device)
        sequences, tokens = self.accelerator.reduce(totals, reduction="sum").tolist()
        groups: list[TrainingGroup] = weighted_groups(
            scored,
            advantages.advantages,
            masks,
            config,
            total_sequences=sequences,
            total_tokens=tokens,
            micro_batch_size=max(1, len(masks)),
            total_micro_batches=self.accelerator.num_processes,
        )
        return update_metrics(self.updater.measure(groups), config, self.accelerator)


def _means(batches: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Means over batches, each counted by its number of prompts."""
    means = {}
    for name in OF_UPDATE:
        values = [(count, figures[name]) for count, figures in batches if name in figures and count]
        if values:
            means[name] = sum(count * value for count, value in values) / sum(count for count, _ in values)
    return means
