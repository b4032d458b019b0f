"""GRPO's operations over flat (packed) tokens. Usable alone: imports torch and nothing of fastgrpo."""

from fastgrpo_kernels.grpo_loss import grpo_loss
from fastgrpo_kernels.linear_logprob import linear_logprob
from fastgrpo_kernels.reference import logprob_from_logits
from fastgrpo_kernels.types import LogprobOutput, LossMetrics, LossOutput, LossParams, Surrogate

__all__ = [
    "LogprobOutput",
    "LossMetrics",
    "LossOutput",
    "LossParams",
    "Surrogate",
    "grpo_loss",
    "linear_logprob",
    "logprob_from_logits",
]
