"""How token losses add up: one weight per token of each completion, and the loss parameters of a config.

The weights come from the logical batch (all completions of an optimizer step, over all ranks), so the loss
does not depend on how tokens are later packed into micro-batches.
"""

from typing import Protocol

import torch
from fastgrpo_kernels import ImportanceCorrection, LossParams, Surrogate, VespoParams
from torch import Tensor

from fastgrpo.config import LOSS_TYPES, GRPOConfig
from fastgrpo.update.micro_loss import Scaling

_SURROGATES: dict[str, Surrogate] = {"cispo": "cispo", "sapo": "sapo", "vespo": "reinforce"}
"""Loss types whose surrogate is not the clipped one."""


class ObjectiveConfig(Protocol):
    """The settings `loss_params` reads, under TRL's names. `epsilon_high` None means `epsilon`."""

    loss_type: str
    epsilon: float
    epsilon_high: float | None
    delta: float | None
    beta: float
    importance_sampling_level: str
    use_bias_correction_kl: bool
    sapo_temperature_neg: float
    sapo_temperature_pos: float


def sequence_weights(
    token_counts: Tensor,
    loss_type: str,
    *,
    max_completion_length: int,
    total_sequences: float,
    total_tokens: float | Tensor,
    micro_batch_size: int,
    total_micro_batches: float,
) -> Tensor:
    """[S] float32: the weight of each token of a completion; Σ weight · ℓ over all ranks is the batch's loss.

    grpo and sapo: mean over completions of their token means. bnpo: mean over micro-batches of their token
    means. dr_grpo: Σ ℓ / (completions × max_completion_length). dapo, cispo and vespo: mean over tokens. luspo: mean
    over completions of their token sums. As in TRL 1.16; every normaliser is at least 1.

    Args:
        token_counts: [S] int64, counted tokens of each completion on this rank (0 if fully masked).
        max_completion_length: used by dr_grpo.
        total_sequences: completions of the logical batch, over all ranks, fully masked ones included.
        total_tokens: counted tokens of the logical batch, over all ranks. (If one rollout feeds several optimizer
            steps, TRL divides the rollout's tokens by the number of steps.)
        micro_batch_size: consecutive completions in one of bnpo's micro-batches, however they are packed later.
        total_micro_batches: their number over all ranks.

    Raises:
        ValueError: unknown `loss_type`.
    """
    counts = token_counts.float()
    if loss_type in ("grpo", "sapo"):
        return 1 / (max(1, total_sequences) * counts.clamp(min=1))
    if loss_type == "bnpo":
        owner = torch.arange(len(counts), device=counts.device) // micro_batch_size  # [S]
        sums = counts.new_zeros(len(counts)).index_add(0, owner, counts)
        return 1 / (max(1, total_micro_batches) * sums[owner].clamp(min=1))
    if loss_type == "dr_grpo":
        return torch.full_like(counts, 1 / max(1, total_sequences * max_completion_length))
    if loss_type in ("dapo", "cispo", "vespo"):
        return torch.ones_like(counts) / torch.as_tensor(total_tokens, device=counts.device).clamp(min=1)
    if loss_type == "luspo":
        return torch.full_like(counts, 1 / max(1, total_sequences))
    raise ValueError(f"loss_type={loss_type!r} is not valid: use one of {', '.join(LOSS_TYPES)}.")


def loss_params(config: ObjectiveConfig) -> LossParams:
    """The loss parameters of a config.

    Raises:
        ValueError: an unknown `loss_type` or `importance_sampling_level`, or a number out of range.
    """
    if config.loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={config.loss_type!r} is not valid: use one of {', '.join(LOSS_TYPES)}.")
    if config.importance_sampling_level not in ("token", "sequence"):
        raise ValueError(
            f"importance_sampling_level={config.importance_sampling_level!r} is not valid: use token or sequence."
        )
    return LossParams(
        surrogate=_SURROGATES.get(config.loss_type, "clipped"),
        level="token" if config.importance_sampling_level == "token" else "sequence",
        epsilon_low=config.epsilon,
        epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
        delta=config.delta,
        beta=config.beta,
        kl_bias_correction=config.use_bias_correction_kl,
        sapo_temperature_pos=config.sapo_temperature_pos,
        sapo_temperature_neg=config.sapo_temperature_neg,
    )


def scaling(config: GRPOConfig) -> Scaling:
    """What a config has the surrogate multiplied by."""
    correction = None
    if config.corrects_sampling:
        level, outside = config.vllm_importance_sampling_mode.split("_")
        correction = ImportanceCorrection(
            level="token" if level == "token" else "sequence",
            outside="mask" if outside == "mask" else "truncate",
            low=config.vllm_importance_sampling_clip_min,
            high=config.vllm_importance_sampling_clip_max,
        )
    vespo = VespoParams(config.vespo_k_pos, config.vespo_lambda_pos, config.vespo_k_neg, config.vespo_lambda_neg)
    return Scaling(
        correction,
        off_policy_threshold=config.off_policy_mask_threshold,
        from_sampler=config.use_vllm,
        vespo=vespo if config.loss_type == "vespo" else None,
    )
