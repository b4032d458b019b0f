"""Factors of the surrogate, for `grpo_loss`'s `policy_scale`: what off-policy and stale tokens still count for.

Elementwise over [T] tokens, without gradient: next to the LM head they cost nothing, so this is every device's path.
Masked-out tokens may hold anything, NaN included.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastgrpo_kernels.checks import computing_dtype
from fastgrpo_kernels.reference.segments import Segments
from fastgrpo_kernels.types import Level, check_option

VESPO_CAP = 20.0
"""Largest log ratio in VESPO, of a token and of a sequence."""
VESPO_FLOOR = -18.420680743952367
"""Smallest log ratio of a sequence in VESPO: log 1e-8."""


@dataclass(frozen=True)
class ImportanceCorrection:
    """How the ratio of the trainer's to the sampler's probabilities is bounded: TIS and MIS, arXiv 2510.18855.

    Raises:
        ValueError: a field has a value that cannot work; the message names the field, the value and the fix.
    """

    level: Level = "sequence"
    """A ratio per token, or one per sequence: the product of its tokens'."""
    outside: Literal["truncate", "mask"] = "mask"
    """Ratios out of bounds are set to the bound, or to 0."""
    low: float | None = None
    high: float | None = 3.0

    def __post_init__(self) -> None:
        check_option("level", self.level, self.level in get_args(Level), "token or sequence")
        check_option("outside", self.outside, self.outside in ("truncate", "mask"), "truncate or mask")
        bounded = self.outside == "mask" or (self.low, self.high) != (None, None)
        check_option("high", self.high, bounded, "a bound, here or as low: there is nothing to truncate to")
        ordered = self.low is None or self.high is None or self.low < self.high
        check_option("low", self.low, ordered, f"a number below high={self.high}")


@dataclass(frozen=True)
class VespoParams:
    """Exponents k and decays lambda of VESPO's weights, for advantages of 0 and more, and for those below."""

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0


@torch.no_grad()
def importance_ratio(
    old_logprobs: Tensor, sampling_logprobs: Tensor, cu_seqlens: Tensor, mask: Tensor, correction: ImportanceCorrection
) -> Tensor:
    """π_old / π_sampler of each token or sequence within bounds: [T] or [N].

    Args:
        old_logprobs: [T], of the policy that drew the tokens, as the trainer computes it.
        sampling_logprobs: [T], of the distribution they were drawn from.
        cu_seqlens: [N + 1] int64.
        mask: [T] bool, the tokens that count.
    """
    log_ratio = _counted(old_logprobs - sampling_logprobs, mask)
    if correction.level == "sequence":
        log_ratio = Segments(cu_seqlens, mask, log_ratio.dtype).sum(log_ratio)
    ratio = log_ratio.exp()
    if correction.outside == "truncate":
        return ratio.clamp(correction.low, correction.high)
    low = -torch.inf if correction.low is None else correction.low
    high = torch.inf if correction.high is None else correction.high
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


@torch.no_grad()
def off_policy_mask(
    logprobs: Tensor, drawn_logprobs: Tensor, advantages: Tensor, cu_seqlens: Tensor, mask: Tensor, threshold: float
) -> Tensor:
    """[N] bool: False for a bad sequence that the policy has moved away from (DeepSeek-V3.2, equation 9).

    That is one with a negative advantage whose mean of drawn − current log-prob is above `threshold`.
    """
    gap = _counted(drawn_logprobs - logprobs, mask)
    return (advantages >= 0) | (Segments(cu_seqlens, mask, gap.dtype).mean(gap) <= threshold)


@torch.no_grad()
def vespo_weights(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor,
    params: VespoParams,
    token_ratio: Tensor | None = None,
) -> Tensor:
    """φ(w) = exp(λ) w^k exp(−λ w) of each sequence, [N], with w its probability ratio (VESPO); φ(1) = 1.

    Args:
        token_ratio: [T], `importance_ratio` per token, which multiplies w; None: 1.
    """
    segments = Segments(cu_seqlens, mask, computing_dtype(logprobs))
    log_ratio = segments.sum(_counted(logprobs - old_logprobs, mask).clamp(-VESPO_CAP, VESPO_CAP))
    if token_ratio is not None:
        log_ratio = log_ratio + segments.sum(_counted(token_ratio.log(), mask).clamp(VESPO_FLOOR, VESPO_CAP))
    log_ratio = log_ratio.clamp(VESPO_FLOOR, VESPO_CAP)
    k = torch.where(advantages >= 0, params.k_pos, params.k_neg)
    decay = torch.where(advantages >= 0, params.lambda_pos, params.lambda_neg).clamp(min=1e-4)
    return (decay + k * log_ratio - decay * log_ratio.exp()).exp()


def _counted(values: Tensor, mask: Tensor) -> Tensor:
    return values.to(computing_dtype(values)).masked_fill(~mask, 0.0)
