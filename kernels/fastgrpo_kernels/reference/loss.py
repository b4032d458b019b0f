"""The GRPO loss over packed tokens, in plain torch."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastgrpo_kernels.reference.checks import computing_dtype, shape_of
from fastgrpo_kernels.types import LOG_RATIO_CAP, LossMetrics, LossOutput, LossParams


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
    cispo −sg[min(r, epsilon_high)] A log-prob (MiniMax-M1), sapo −4 σ(τ (r − 1)) / τ · A (SAPO).
    kl = exp(d) − d − 1 with d = reference log-prob − log-prob (Schulman's k3), times r if bias-corrected.

    Masked-out tokens may hold anything, NaN included; masked-in log-probs must be finite. Where |d| is above
    `params.kl_cap`, or |log r| above `LOG_RATIO_CAP`, kl or r is constant, without gradient.

    Args:
        logprobs: [T], of the policy, with gradient.
        advantages: [N], one per sequence.
        weights: [T], each token's share of the loss.
        cu_seqlens: [N + 1] int64, from 0 to T. Sequences may be empty.
        old_logprobs: [T], of the policy that drew the tokens; None: `logprobs`, detached.
        ref_logprobs: [T], of the frozen reference; needed when beta ≠ 0, otherwise for the KL metric alone.
        mask: [T] bool, the tokens that count; None: all.
        policy_scale: [T], multiplies the surrogate but not the KL: entropy mask, off-policy mask, importance
            ratio, or their product.
        entropy: [T], for the metric, and for the bonus where `entropy_weights` is given.
        entropy_weights: [T], coefficient and normaliser of the entropy bonus.

    Raises:
        ValueError: a shape, dtype or device does not fit, or a needed argument is missing.
    """
    optional = {
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "mask": mask,
        "policy_scale": policy_scale,
        "entropy": entropy,
        "entropy_weights": entropy_weights,
    }
    required = {"advantages": advantages, "weights": weights, "cu_seqlens": cu_seqlens}
    check_loss_inputs(logprobs, params, {**required, **optional})
    mask = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    dtype = computing_dtype(logprobs)

    def counted(values: Tensor) -> Tensor:
        # Before any exp or product: 0 · inf would be NaN, in the gradient too.
        return values.to(dtype).masked_fill(~mask, 0.0)

    segments = _Segments(cu_seqlens, mask, dtype)
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
        kl = k3(logprobs, counted(ref_logprobs), params.kl_cap)
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


_SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor, LossParams], Tensor]] = {
    "clipped": clipped_surrogate,
    "cispo": cispo_surrogate,
    "sapo": sapo_surrogate,
}


def k3(logprobs: Tensor, ref_logprobs: Tensor, cap: float) -> Tensor:
    """exp(d) − d − 1 with d = reference − policy log-prob, [T]; constant where |d| > cap."""
    d = (ref_logprobs - logprobs).clamp(-cap, cap)
    return torch.expm1(d) - d


class _Segments:
    """Means over the masked-in tokens of each sequence."""

    def __init__(self, cu_seqlens: Tensor, mask: Tensor, dtype: torch.dtype) -> None:
        lengths = cu_seqlens.diff().to(mask.device)
        indices = torch.arange(len(lengths), device=mask.device)
        self.owner = indices.repeat_interleave(lengths, output_size=len(mask))  # [T]
        self.mask = mask.to(dtype)
        self.counts = self._sum(self.mask, len(lengths))  # [N]

    def mean(self, values: Tensor) -> Tensor:
        """[T] to [N]; 0 for a sequence without masked-in tokens."""
        return self._sum(values * self.mask, len(self.counts)) / self.counts.clamp(min=1)

    def spread(self, values: Tensor) -> Tensor:
        """[N] to [T]: each token gets its sequence's value."""
        return values[self.owner]

    def _sum(self, values: Tensor, count: int) -> Tensor:
        return values.new_zeros(count).index_add(0, self.owner, values)


@torch.no_grad()
def _metrics(
    segments: _Segments, ratio: Tensor, advantage: Tensor, kl: Tensor, entropy: Tensor, params: LossParams
) -> LossMetrics:
    low, high = _clip_flags(ratio, advantage, params)
    filled = segments.counts > 0
    token_count, sequence_count = segments.mask.sum(), filled.sum().to(ratio.dtype)
    by_token = params.level == "token"
    ratios, present = (ratio, segments.mask > 0) if by_token else (segments.mean(ratio), filled)

    def total(values: Tensor) -> Tensor:
        return (values * segments.mask).sum() if by_token else segments.mean(values).sum()

    return LossMetrics(
        token_count=token_count,
        sequence_count=sequence_count,
        kl_sum=(kl * segments.mask).sum(),
        entropy_sum=entropy.sum(),
        clip_count=token_count if by_token else sequence_count,
        clip_low_sum=total(low),
        clip_high_sum=total(high),
        clip_region_sum=total(low + high),
        clip_low_seq_min=-_max_of(-segments.mean(low), filled),
        clip_high_seq_max=_max_of(segments.mean(high), filled),
        ratio_sum=total(ratio),
        ratio_min=-_max_of(-ratios, present),
        ratio_max=_max_of(ratios, present),
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


def check_loss_inputs(logprobs: Tensor, params: LossParams, arguments: Mapping[str, Tensor | None]) -> None:
    """Raises the ValueError of an argument whose shape, dtype or device does not fit, or that is missing.

    What cu_seqlens holds is checked on CPU alone, since reading it waits for the device, and not under torch.compile.
    """
    if logprobs.dim() != 1:
        raise ValueError(f"logprobs has shape {shape_of(logprobs)}: pass [T], the tokens of all sequences in a row.")
    for name, value in {"logprobs": logprobs, **arguments}.items():
        if value is not None:
            _check_argument(name, value, logprobs)
    advantages, cu_seqlens = arguments["advantages"], arguments["cu_seqlens"]
    assert advantages is not None
    assert cu_seqlens is not None
    sequences = len(advantages)
    if cu_seqlens.shape != (sequences + 1,):
        raise ValueError(f"cu_seqlens has shape {shape_of(cu_seqlens)}: pass {sequences} + 1, as there are advantages.")
    readable = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and int(cu_seqlens[0]) != 0:
        raise ValueError(f"cu_seqlens starts at {int(cu_seqlens[0])}: start it at 0.")
    if readable and int(cu_seqlens[-1]) != len(logprobs):
        raise ValueError(f"cu_seqlens ends at {int(cu_seqlens[-1])}, but there are {len(logprobs)} logprobs.")
    if params.beta != 0 and arguments["ref_logprobs"] is None:
        raise ValueError(f"beta={params.beta} needs ref_logprobs: pass them, or set beta to 0.")
    if arguments["entropy_weights"] is not None and arguments["entropy"] is None:
        raise ValueError("entropy_weights needs entropy: pass it, or leave entropy_weights out.")


def _check_argument(name: str, value: Tensor, logprobs: Tensor) -> None:
    if value.device != logprobs.device:
        raise ValueError(f"{name} is on {value.device}, logprobs on {logprobs.device}: move it there.")
    if name == "mask":
        valid, wanted = value.dtype == torch.bool, "torch.bool"
    elif name == "cu_seqlens":
        valid, wanted = value.dtype in (torch.int32, torch.int64), "torch.int64"
    else:
        valid, wanted = value.is_floating_point(), "floating-point numbers"
    if not valid:
        raise ValueError(f"{name} holds {value.dtype}: pass {wanted}.")
    if name == "advantages" and value.dim() != 1:
        raise ValueError(f"advantages has shape {shape_of(value)}: pass [N], one a sequence.")
    if name not in ("advantages", "cu_seqlens") and value.shape != logprobs.shape:
        raise ValueError(f"{name} has shape {shape_of(value)}, logprobs {shape_of(logprobs)}: pass one value a token.")
