"""Every op in plain torch: the executable specification, the CPU path and the tests' oracle.

Layout: the T tokens of N sequences lie one after the other; `cu_seqlens` [N + 1] int64 holds each sequence's
start and, last, T. Half precision is computed in float32, float64 stays; outputs come in the computing dtype.
Values are checked on CPU only, so that nothing waits for a device; shapes are checked everywhere.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgrpo_kernels.types import (
    LOG_RATIO_CAP,
    LogprobOutput,
    LossMetrics,
    LossOutput,
    LossParams,
    check_option,
)

_CHUNK_COPIES = 8
"""float32 [rows, V] buffers alive at once, at most, in the backward pass of one chunk of `linear_logprob`."""


def logprob_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
) -> LogprobOutput:
    """Log-probs of targets [N] int64 under logits [N, V] of any float dtype, in float32.

    A logit of −inf has probability 0 and adds 0 to the entropy. A row of −inf alone gives log-prob −inf and
    entropy 0, without gradient. A target equal to `ignore_index` gives 0 and 0, without gradient.

    Raises:
        ValueError: wrong shapes, temperature not positive, or (CPU only) a target outside 0..V−1. On a CUDA
            device such a target trips the device-side assertion of indexing.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits {_shape(logits)}, targets {_shape(targets)} do not fit: pass [N, V] and [N].")
    _check_temperature(temperature)
    _check_range("targets", targets, logits.shape[1], ignore_index)
    rows = torch.arange(len(targets), device=logits.device)
    return _logprob_rows(logits, rows, targets, temperature, entropy, ignore_index)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    byte_budget: int = 1 << 30,
) -> LogprobOutput:
    """`logprob_from_logits(hidden[rows] @ weight.T, targets)` without ever holding [N, V].

    Works through chunks of hidden rows and recomputes each chunk's logits in the backward pass. A row's
    logits are computed once per pass however many targets read it; for that, `rows` on a CUDA device are read
    back. The product is taken in the inputs' dtype, all else in float32.

    Args:
        hidden: [T, H].
        weight: [V, H].
        targets: [N] int64.
        rows: [N] int64, the hidden row that target n reads; None: target n reads row n, and N = T.
        byte_budget: bytes of scratch that a chunk may take; one row is taken at least. Beside it the gradient
            of `weight` needs two [V, H] buffers.

    Raises:
        ValueError: as `logprob_from_logits`; `rows` missing where N ≠ T, or (CPU only) outside 0..T−1.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {_shape(hidden)}, weight {_shape(weight)} do not fit: pass [T, H] and [V, H].")
    if targets.ndim != 1 or targets.shape != (hidden.shape[:1] if rows is None else rows.shape):
        reason = f"one per row of hidden {_shape(hidden)}, or pass rows" if rows is None else "one per entry of rows"
        raise ValueError(f"targets {_shape(targets)} do not fit: pass {reason}.")
    _check_temperature(temperature)
    _check_range("targets", targets, weight.shape[0], ignore_index)
    chunk_rows = max(1, byte_budget // (4 * _CHUNK_COPIES * weight.shape[0]))
    local, order, sizes = torch.arange(len(targets), device=hidden.device), None, [chunk_rows]
    if rows is None:
        sizes = [len(chunk) for chunk in local.split(chunk_rows)]
    else:
        _check_range("rows", rows, hidden.shape[0])
        used, local, readers = rows.unique(return_inverse=True, return_counts=True)
        order = local.argsort(stable=True)  # targets of one hidden row side by side
        hidden, targets, local = hidden[used], targets[order], local[order]
        sizes = [int(chunk.sum()) for chunk in readers.split(chunk_rows)]

    def run_chunk(chunk: Tensor, chunk_local: Tensor, chunk_targets: Tensor) -> LogprobOutput:
        logits = F.linear(chunk, weight)
        return _logprob_rows(logits, chunk_local, chunk_targets, temperature, entropy, ignore_index)

    chunks = zip(hidden.split(chunk_rows), (local % chunk_rows).split(sizes), targets.split(sizes), strict=True)
    outputs = [checkpoint(run_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    back = slice(None) if order is None else order.argsort()
    logprobs = torch.cat([output.logprobs for output in outputs])[back]
    return LogprobOutput(logprobs, torch.cat([o.entropy for o in outputs])[back] if entropy else None)


def _logprob_rows(
    logits: Tensor, rows: Tensor, targets: Tensor, temperature: float, entropy: bool, ignore_index: int
) -> LogprobOutput:
    """Targets [N] that read rows [N] of logits [R, V]."""
    ignored = targets == ignore_index
    scaled = logits.to(_computing_dtype(logits)) / temperature
    # log_softmax of a row of −inf alone is NaN, forward and backward.
    dead = scaled.detach().amax(dim=-1) == -math.inf  # [R]
    logp = torch.log_softmax(scaled.masked_fill(dead[:, None], 0.0), dim=-1)
    logprobs = logp[rows, targets.masked_fill(ignored, 0)]
    logprobs = logprobs.masked_fill(dead[rows], -math.inf).masked_fill(ignored, 0.0)
    if not entropy:
        return LogprobOutput(logprobs, None)
    # 0 · −inf counts as 0.
    by_row = -(logp.exp() * logp.masked_fill(logp == -math.inf, 0.0)).sum(dim=-1)  # [R]
    return LogprobOutput(logprobs, by_row[rows].masked_fill(ignored | dead[rows], 0.0))


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
        ValueError: a shape does not fit, or a needed argument is missing.
    """
    optional = {
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "mask": mask,
        "policy_scale": policy_scale,
        "entropy": entropy,
        "entropy_weights": entropy_weights,
    }
    _check_loss_inputs(logprobs, advantages, cu_seqlens, params, {"weights": weights, **optional})
    mask = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    dtype = _computing_dtype(logprobs)

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


def _computing_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _check_temperature(temperature: float) -> None:
    check_option("temperature", temperature, 0 < temperature < math.inf, "a finite number above 0")


def _check_range(name: str, indices: Tensor, size: int, ignore_index: int | None = None) -> None:
    if indices.device.type != "cpu":
        return
    wrong = (indices < 0) | (indices >= size)
    if ignore_index is not None:
        wrong &= indices != ignore_index
    if wrong.any():
        position = int(wrong.nonzero()[0])
        raise ValueError(f"{name}[{position}]={int(indices[position])} is outside 0..{size - 1}.")


def _check_loss_inputs(
    logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    params: LossParams,
    per_token: dict[str, Tensor | None],
) -> None:
    tokens, sequences = logprobs.shape, len(advantages)
    for name, value in per_token.items():
        if value is not None and value.shape != tokens:
            raise ValueError(f"{name} has shape {_shape(value)}, logprobs {_shape(logprobs)}: pass one value a token.")
    if cu_seqlens.shape != (sequences + 1,):
        raise ValueError(f"cu_seqlens has shape {_shape(cu_seqlens)}: pass {sequences} + 1, as there are advantages.")
    if cu_seqlens.device.type == "cpu" and int(cu_seqlens[-1]) != len(logprobs):
        raise ValueError(f"cu_seqlens ends at {int(cu_seqlens[-1])}, but there are {len(logprobs)} logprobs.")
    if params.beta != 0 and per_token["ref_logprobs"] is None:
        raise ValueError(f"beta={params.beta} needs ref_logprobs: pass them, or set beta to 0.")
    if per_token["entropy_weights"] is not None and per_token["entropy"] is None:
        raise ValueError("entropy_weights needs entropy: pass it, or leave entropy_weights out.")
