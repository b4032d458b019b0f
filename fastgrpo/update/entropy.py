"""What a run does about its entropy: a bonus, a coefficient that follows a target, and training on high-entropy tokens.

The filter (arXiv 2506.01939) needs every entropy of a micro-batch before its gradients, so with it the policy makes one
more forward pass over the step. The coefficient's rule is Skywork-OR1's (arXiv 2505.22312).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from fastgrpo.config import GRPOConfig
from fastgrpo.types import TrainingGroup, Updater, UpdateResult
from fastgrpo.update.objective import sequence_weights

NO_ENTROPY = -1.0
"""Fills up what ranks gather: no entropy is negative."""


class EntropyControl:
    """Adds the bonus and the filter to a step's groups, and moves the bonus's coefficient after it."""

    def __init__(self, config: GRPOConfig, accelerator: Accelerator) -> None:
        self.config = config
        self.accelerator = accelerator
        self.coefficient = config.entropy_coef
        self.last_entropy = math.inf
        """Of the step before, over all ranks; above any target before the first."""
        self._kept_entropy: Tensor | None = None
        """[2]: sum and number of the entropies that the filter kept on this rank."""

    @property
    def has_bonus(self) -> bool:
        """Whether the loss has an entropy term, though its coefficient may be 0 at the moment."""
        return self.config.entropy_coef != 0 or self.config.use_adaptive_entropy

    def prepare(self, groups: Sequence[TrainingGroup], updater: Updater, micro_batches: int = 1) -> list[TrainingGroup]:
        """The groups with what the entropy terms need. Every rank must call it, with groups or without.

        Args:
            micro_batches: of the optimizer step on one rank.
        """
        groups = list(groups)
        if self.config.top_entropy_quantile < 1:
            groups = self._filtered(groups, updater, micro_batches)
        return self._with_bonus(groups, micro_batches) if self.has_bonus else groups

    def finish(self, result: UpdateResult) -> dict[str, float]:
        """Moves the coefficient, and gives the metrics of it. Every rank must call it."""
        if not self.has_bonus:
            return {}
        if self.config.use_adaptive_entropy:
            sums = torch.stack([result.metrics.entropy_sum, result.metrics.token_count])
            total, count = self.accelerator.reduce(
                sums if self._kept_entropy is None else self._kept_entropy, reduction="sum"
            ).tolist()
            self.last_entropy = total / max(count, 1)
            if self.last_entropy <= self.config.entropy_target:
                raised = self.coefficient + self.config.entropy_coef_delta
                self.coefficient = min(raised, self.config.entropy_coef_max)
            else:
                lowered = self.coefficient - self.config.entropy_coef_delta
                self.coefficient = max(lowered, self.config.entropy_coef_min)
        policy_loss = self.accelerator.reduce(result.loss + result.terms.bonus_sum, reduction="sum")
        return {"policy_loss": policy_loss.item(), "entropy_coef": self.coefficient}

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"coefficient": self.coefficient, "last_entropy": self.last_entropy}

    def load(self, state: dict[str, float]) -> None:
        """Takes over what `state` gave; nothing from a checkpoint without it."""
        self.coefficient = state.get("coefficient", self.coefficient)
        self.last_entropy = state.get("last_entropy", self.last_entropy)

    def _filtered(self, groups: list[TrainingGroup], updater: Updater, micro_batches: int) -> list[TrainingGroup]:
        """Only the share of tokens with the highest entropies, of a micro-batch over all ranks, moves the policy."""
        own = [entropy for group in updater.entropies(groups) for entropy in group]
        masks = [mask for group in groups for mask in group.masks]
        size, device = self.config.batch_plan.completions_per_micro_batch, self.accelerator.device
        self._kept_entropy = torch.zeros(2, device=device)
        kept_tokens = [torch.zeros(0, device=device)]
        for first in range(0, micro_batches * size, size):
            part = slice(first, first + size)
            counted = [entropy[mask.to(device)] for entropy, mask in zip(own[part], masks[part], strict=True)]
            mine = torch.cat([torch.zeros(0, device=device), *counted])
            every = self.accelerator.gather(self.accelerator.pad_across_processes(mine, pad_index=NO_ENTROPY))
            every = every[every != NO_ENTROPY]
            threshold = torch.quantile(every, 1 - self.config.top_entropy_quantile) if len(every) else 0.0
            kept = mine[mine >= threshold]
            self._kept_entropy += torch.stack([kept.sum(), torch.ones_like(kept).sum()])
            kept_tokens += [(entropy >= threshold).float() for entropy in own[part]]
        pieces = iter(torch.cat(kept_tokens).cpu().split([len(entropy) for entropy in own]))
        return [replace(group, policy_scale=tuple(next(pieces) for _ in group.masks)) for group in groups]

    def _with_bonus(self, groups: list[TrainingGroup], micro_batches: int) -> list[TrainingGroup]:
        """The bonus is the mean over the tokens of a micro-batch, then over micro-batches, whatever the loss type."""
        applies = not self.config.use_adaptive_entropy or self.last_entropy <= self.config.entropy_target
        kept = [
            mask & (scale != 0)
            for group in groups
            for mask, scale in zip(group.masks, group.policy_scale or group.masks, strict=True)
        ]
        weights = sequence_weights(
            torch.tensor([int(mask.sum()) for mask in kept], dtype=torch.int64),
            "bnpo",
            max_completion_length=self.config.max_completion_length,
            total_sequences=0,
            total_tokens=0,
            micro_batch_size=self.config.batch_plan.completions_per_micro_batch,
            total_micro_batches=micro_batches * self.accelerator.num_processes,
        )
        weights = weights * (self.coefficient if applies else 0.0)
        per_token = iter([mask.float() * weight for mask, weight in zip(kept, weights, strict=True)])
        return [replace(group, entropy_weights=tuple(next(per_token) for _ in group.masks)) for group in groups]
