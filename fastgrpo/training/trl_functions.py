"""Parts of TRL's loss as its trainer offers them, on padded batches: for scripts that call them, not used in a step."""

from typing import Any

import torch
from fastgrpo_kernels import VespoParams, off_policy_mask, vespo_weights
from torch import Tensor

BELOW_EVERY_ENTROPY = -1.0


class TRLFunctions:
    """Methods of TRL's `GRPOTrainer` that compute something from tensors [B, T] of B completions of T tokens."""

    accelerator: Any

    def get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        """[B, T] bool: the tokens in `mask` whose entropy is at least the quantile `threshold`, over all ranks."""
        mine = entropies[mask.bool()].float()
        padded = self.accelerator.pad_across_processes(mine, dim=0, pad_index=BELOW_EVERY_ENTROPY)
        every = self.accelerator.gather(padded)
        every = every[every != BELOW_EVERY_ENTROPY]
        if not len(every):
            return torch.zeros_like(mask, dtype=torch.bool)
        return (entropies >= torch.quantile(every, threshold)) & mask.bool()

    @staticmethod
    def get_off_policy_mask(
        advantages: Tensor,
        per_token_logps: Tensor,
        sampling_per_token_logps: Tensor,
        mask: Tensor,
        off_policy_threshold: float,
    ) -> Tensor:
        """[B, 1]: 0 for a completion of negative advantage ([B, 1]) that the policy has moved away from, else 1.

        Tokens without a sampling log-prob (NaN) say nothing of that.
        """
        gap = (sampling_per_token_logps - per_token_logps).nan_to_num(nan=0.0).detach()
        layout = _rows(mask), mask.flatten().bool()
        kept = off_policy_mask(
            torch.zeros_like(gap).flatten(), gap.flatten(), advantages.flatten(), *layout, off_policy_threshold
        )
        return kept[:, None].to(mask.dtype)

    @staticmethod
    def get_gamma_weights(
        advantages: Tensor,
        log_ratio_per_token: Tensor,
        mask: Tensor,
        importance_sampling_ratio: Tensor | None,
        k_pos: float = 2.0,
        lambda_pos: float = 3.0,
        k_neg: float = 3.0,
        lambda_neg: float = 2.0,
    ) -> Tensor:
        """[B, 1]: VESPO's weights of completions, from their log ratios and advantages ([B, 1])."""
        log_ratio = log_ratio_per_token.detach()
        weights = vespo_weights(
            log_ratio.flatten(),
            torch.zeros_like(log_ratio).flatten(),
            advantages.flatten(),
            _rows(mask),
            mask.flatten().bool(),
            VespoParams(k_pos, lambda_pos, k_neg, lambda_neg),
            None if importance_sampling_ratio is None else importance_sampling_ratio.flatten(),
        )
        return weights[:, None]


def _rows(mask: Tensor) -> Tensor:
    """The bounds of each row in a flattened [B, T]."""
    count, length = mask.shape
    return torch.arange(0, count * length + 1, length, device=mask.device)
