"""The GRPO loss over packed tokens."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastgrpo_kernels.checks import computing_dtype
from fastgrpo_kernels.reference.segments import Segments
from fastgrpo_kernels.types import KL_CAP, LOG_RATIO_CAP, LossMetrics, LossOutput, LossParams


def grpo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    params: LossParams,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    policy_scale: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_weights: Tensor | None = None,
) -> LossOutput:
    """Σ_t weight_t (scale_t surrogate_t + beta kl_t) − entropy_weight_t entropy_t over masked-in tokens.

    With ratio r = exp(log-prob − old log-prob) and advantage A, per token, as in TRL 1.16:
    clipped −min(min(r, delta) A, clip(r, 1 − epsilon_low, 1 + epsilon_high) A) (PPO; delta: INTELLECT-2),
    cispo −sg[min(r, epsilon_high)] A log-prob (MiniMax-M1), sapo −4 σ(τ (r − 1)) / τ · A (SAPO), reinforce −A log-prob
    (with `vespo_weights` for its scale: VESPO).
    kl = exp(d) − d − 1 with d = reference log-prob − log-prob (Schulman's k3), times r if bias-corrected.

    Masked-out tokens may hold anything, NaN included; masked-in log-probs must be finite. Where |d| is above `KL_CAP`,
    or |log r| above `LOG_RATIO_CAP`, kl or r is constant, without gradient.

    Args:
        logprobs: [T], of the policy, with gradient.
        advantages: [N], one per sequence.
        weights: [T], each token's share of the loss.
        cu_seqlens: [N + 1] int64, from 0 to T. Sequences may be empty.
        old_logprobs: [T], of the policy that drew the tokens; None: `logprobs`, detached.
        ref_logprobs: [T], of the frozen reference; needed when beta ≠ 0, otherwise for the KL metric alone.
        mask: [T] bool, the tokens that count; None: all.
        policy_scale: [T], multiplies the surrogate but not the KL: entropy mask, off-policy mask, importance ratio,
            VESPO's weights, or a product of them.
        entropy: [T], for the metric, and for the bonus where `entropy_weights` is given.
        entropy_weights: [T], coefficient and normaliser of the entropy bonus.

    Raises:
        ValueError: a shape, dtype or device does not fit, or a needed argument is missing.
    """
    mask = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    dtype = computing_dtype(logprobs)

    def counted(values: Tensor) -> Tensor:
        # Before any exp or product: 0 · inf would be NaN, in the gradient too.
        return values.to(dtype).masked_fill(~mask, 0.0)

    segments = Segments(cu_seqlens, mask, dtype)
    logprobs = counted(logprobs)
    log_ratio = logprobs - (logprobs.detach() if old_logprobs is None else counted(old_logprobs))
    if params.level == "sequence":
        log_ratio = segments.spread(segments.mean(log_ratio))
    ratio = log_ratio.clamp(-LOG_RATIO_CAP, LOG_RATIO_CAP).exp()
    advantage = segments.spread(advantages.to(dtype))

    token_loss = _SURROGATES[params.surrogate](ratio, advantage, logprobs, params)
    if policy_scale is not None:
        token_loss = token_loss * counted(policy_scale)
    kl = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        kl = k3(logprobs, counted(ref_logprobs))
        kl = kl * ratio if params.kl_bias_correction else kl
    if params.beta != 0:
        token_loss = token_loss + params.beta * kl
    loss = (counted(weights) * token_loss).sum()
    entropy = torch.zeros_like(logprobs) if entropy is None else counted(entropy)
    if entropy_weights is not None:
        loss = loss - (counted(entropy_weights) * entropy).sum()
    return LossOutput(loss, _metrics(segments, ratio, advantage, kl, entropy, params))


def clipped_surrogate(ratio: Tensor, advantage: Tensor, logprobs: Tensor, params: LossParams) -> Tensor:
    """−min(min(r, delta) A, clip(r, 1 − epsilon_low, 1 + epsilon_high) A), [T]."""
    clipped = ratio.clamp(1 - params.epsilon_low, 1 + params.epsilon_high)
    return -torch.min(_bounded(ratio, params) * advantage, clipped * advantage)


def cispo_surrogate(ratio: Tensor, advantage: Tensor, logprobs: Tensor, params: LossParams) -> Tensor:
    """−sg[min(r, epsilon_high)] A log-prob, [T]."""
    return -ratio.detach().clamp(max=params.epsilon_high) * advantage * logprobs


def sapo_surrogate(ratio: Tensor, advantage: Tensor, logprobs: Tensor, params: LossParams) -> Tensor:
    """−4 σ(τ (r − 1)) / τ · A with τ chosen by the advantage's sign, [T]."""
    tau = torch.full_like(ratio, params.sapo_temperature_neg)
    tau = tau.masked_fill(advantage > 0, params.sapo_temperature_pos)
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage


def reinforce_surrogate(ratio: Tensor, advantage: Tensor, logprobs: Tensor, params: LossParams) -> Tensor:
    """−A log-prob, [T]."""
    return -advantage * logprobs


_SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor, LossParams], Tensor]] = {
    "clipped": clipped_surrogate,
    "cispo": cispo_surrogate,
    "sapo": sapo_surrogate,
    "reinforce": reinforce_surrogate,
}


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(d) − d − 1 with d = reference − policy log-prob, [T]; constant where |d| > KL_CAP."""
    d = (ref_logprobs - logprobs).clamp(-KL_CAP, KL_CAP)
    return torch.expm1(d) - d


@torch.no_grad()
def _metrics(
    segments: Segments, ratio: Tensor, advantage: Tensor, kl: Tensor, entropy: Tensor, params: LossParams
) -> LossMetrics:
    low, high = _clip_flags(ratio, advantage, params)
    low_shares, high_shares = segments.mean(low), segments.mean(high)
    filled = segments.counts > 0
    token_count = segments.mask.sum()
    if params.level == "token":
        clip_count, low_sum, high_sum = token_count, (low * segments.mask).sum(), (high * segments.mask).sum()
    else:  # one ratio per sequence: all of its tokens are clipped, or none
        clip_count, low_sum, high_sum = filled.sum().to(ratio.dtype), low_shares.sum(), high_shares.sum()
    return LossMetrics(
        token_count=token_count,
        kl_sum=(kl * segments.mask).sum(),
        entropy_sum=entropy.sum(),
        clip_count=clip_count,
        clip_low_sum=low_sum,
        clip_high_sum=high_sum,
        clip_region_sum=low_sum + high_sum,
        clip_low_seq_min=-_max_of(-low_shares, filled),
        clip_high_seq_max=_max_of(high_shares, filled),
    )


def _clip_flags(ratio: Tensor, advantage: Tensor, params: LossParams) -> tuple[Tensor, Tensor]:
    """Per token 1.0 where the ratio is clipped from below, and from above; never both."""
    low = high = torch.zeros_like(ratio, dtype=torch.bool)
    if params.surrogate == "clipped":
        bounded = _bounded(ratio, params)
        low = (bounded < 1 - params.epsilon_low) & (advantage < 0)
        high = (bounded > 1 + params.epsilon_high) & (advantage > 0)
    elif params.surrogate == "cispo":
        high = (ratio > params.epsilon_high) & (advantage > 0)
    return low.to(ratio.dtype), high.to(ratio.dtype)


def _bounded(ratio: Tensor, params: LossParams) -> Tensor:
    return ratio if params.delta is None else ratio.clamp(max=params.delta)


def _max_of(values: Tensor, present: Tensor) -> Tensor:
    """The greatest present value; −inf where there is none."""
    return torch.cat([values.masked_fill(~present, -math.inf), values.new_full((1,), -math.inf)]).max()
