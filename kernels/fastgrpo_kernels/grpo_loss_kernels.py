"""The kernels of `grpo_loss`: one program per sequence, then the reduction over sequences; a function per surrogate."""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from fastgrpo_kernels.types import KL_CAP, LOG_RATIO_CAP

_RATIO_CAP = tl.constexpr(LOG_RATIO_CAP)
_KL_CAP = tl.constexpr(KL_CAP)


@triton.jit(do_not_specialize_on_alignment=["logprobs", "entropy"])  # views into one tensor of both
def loss_kernel(
    cu_seqlens: tl.tensor,
    advantages: tl.tensor,
    mask: tl.tensor | None,
    logprobs: tl.tensor,
    weights: tl.tensor,
    old_logprobs: tl.tensor | None,
    ref_logprobs: tl.tensor | None,
    policy_scale: tl.tensor | None,
    entropy: tl.tensor | None,
    entropy_weights: tl.tensor | None,
    gradient: tl.tensor,
    partials: tl.tensor,
    beta: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    delta: tl.tensor,
    tau_pos: tl.tensor,
    tau_neg: tl.tensor,
    SURROGATE: tl.constexpr,
    SEQUENCE_LEVEL: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per sequence: gradient of its tokens, and its column of the partials [10, N]."""
    sequence = tl.program_id(0)
    sequences = tl.num_programs(0)
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    advantage = tl.load(advantages + sequence).to(tl.float32)

    if SEQUENCE_LEVEL:
        mean, through_mean = _sequence_level(
            begin,
            end,
            advantage,
            mask,
            logprobs,
            weights,
            old_logprobs,
            ref_logprobs,
            policy_scale,
            beta,
            low,
            high,
            delta,
            tau_pos,
            tau_neg,
            SURROGATE,
            KL_TIMES_RATIO,
            BLOCK,
        )
    counts = tl.zeros([BLOCK], tl.float32)
    losses = tl.zeros([BLOCK], tl.float32)
    kls = tl.zeros([BLOCK], tl.float32)
    entropies = tl.zeros([BLOCK], tl.float32)
    lows = tl.zeros([BLOCK], tl.float32)
    highs = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        counted = _counted(mask, tokens, end)
        logprob = _load(logprobs, tokens, counted, 0.0)
        weight = _load(weights, tokens, counted, 0.0)
        scale = _load(policy_scale, tokens, counted, 1.0)
        bonus = _load(entropy_weights, tokens, counted, 0.0)
        token_entropy = _load(entropy, tokens, counted, 0.0)
        log_ratio = logprob - _load(old_logprobs, tokens, counted, logprob)
        if SEQUENCE_LEVEL:
            log_ratio = tl.where(counted, mean, 0.0)
        ratio, moves = _ratio(log_ratio)
        policy, by_log_ratio, by_logprob, is_low, is_high = SURROGATE(
            ratio, advantage, logprob, low, high, delta, tau_pos, tau_neg
        )
        kl, kl_by_logprob = _k3(logprob, _load(ref_logprobs, tokens, counted, logprob))
        slope = scale * by_log_ratio
        if KL_TIMES_RATIO:
            kl *= ratio
            kl_by_logprob *= ratio
            slope += beta * kl
        token_gradient = weight * (scale * by_logprob + beta * kl_by_logprob)
        if SEQUENCE_LEVEL:
            token_gradient += through_mean
        else:
            token_gradient += weight * moves * slope
        tl.store(gradient + tokens, tl.where(counted, token_gradient, 0.0), mask=tokens < end)

        one = counted.to(tl.float32)
        counts += one
        losses += weight * (scale * policy + beta * kl) - bonus * token_entropy
        kls += kl
        entropies += token_entropy
        lows += one * is_low
        highs += one * is_high

    count = tl.sum(counts)
    low_sum, high_sum, clip_count = tl.sum(lows), tl.sum(highs), count
    low_share, high_share = low_sum / tl.maximum(count, 1.0), high_sum / tl.maximum(count, 1.0)
    if SEQUENCE_LEVEL:
        low_sum, high_sum, clip_count = low_share, high_share, (count > 0).to(tl.float32)
    column = partials + sequence  # rows in the order of grpo_loss._COLUMNS
    tl.store(column, tl.sum(losses))
    tl.store(column + sequences, count)
    tl.store(column + 2 * sequences, tl.sum(kls))
    tl.store(column + 3 * sequences, tl.sum(entropies))
    tl.store(column + 4 * sequences, clip_count)
    tl.store(column + 5 * sequences, low_sum)
    tl.store(column + 6 * sequences, high_sum)
    tl.store(column + 7 * sequences, low_sum + high_sum)
    tl.store(column + 8 * sequences, tl.where(count > 0, low_share, float("inf")))
    tl.store(column + 9 * sequences, tl.where(count > 0, high_share, float("-inf")))


@triton.jit
def _sequence_level(
    begin: tl.tensor,
    end: tl.tensor,
    advantage: tl.tensor,
    mask: tl.tensor | None,
    logprobs: tl.tensor,
    weights: tl.tensor,
    old_logprobs: tl.tensor | None,
    ref_logprobs: tl.tensor | None,
    policy_scale: tl.tensor | None,
    beta: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    delta: tl.tensor,
    tau_pos: tl.tensor,
    tau_neg: tl.tensor,
    SURROGATE: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
    BLOCK: tl.constexpr,
) -> Any:
    """The sequence's mean log ratio, and the gradient through it for each counted token."""
    counts = tl.zeros([BLOCK], tl.float32)
    log_ratios = tl.zeros([BLOCK], tl.float32)
    policy_weights = tl.zeros([BLOCK], tl.float32)
    kls = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        counted = _counted(mask, tokens, end)
        logprob = _load(logprobs, tokens, counted, 0.0)
        weight = _load(weights, tokens, counted, 0.0)
        kl, _ = _k3(logprob, _load(ref_logprobs, tokens, counted, logprob))
        counts += counted.to(tl.float32)
        log_ratios += logprob - _load(old_logprobs, tokens, counted, logprob)
        policy_weights += weight * _load(policy_scale, tokens, counted, 1.0)
        kls += weight * kl
    count = tl.maximum(tl.sum(counts), 1.0)
    mean = tl.sum(log_ratios) / count
    ratio, moves = _ratio(mean)
    # No surrogate's derivative by the log ratio depends on the log-prob, so it is one number per sequence.
    _, by_log_ratio, _, _, _ = SURROGATE(ratio, advantage, 0.0, low, high, delta, tau_pos, tau_neg)
    slope = tl.sum(policy_weights) * by_log_ratio
    if KL_TIMES_RATIO:
        slope += beta * ratio * tl.sum(kls)
    return mean, moves * slope / count


@triton.jit
def reduce_kernel(
    partials: tl.tensor,
    totals: tl.tensor,
    sequences: tl.tensor,
    SUMS: tl.constexpr,
    MINIMA: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per row of the partials [10, N]: its sum, minimum or maximum, always in the same order."""
    row = tl.program_id(0)
    sign = tl.where(row < SUMS + MINIMA, -1.0, 1.0)  # a minimum is the negative maximum of the negatives
    total = tl.zeros([BLOCK], tl.float32)
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, sequences, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < sequences
        values = tl.load(partials + row * sequences + columns, mask=inside, other=0.0)
        total += values
        greatest = tl.maximum(greatest, tl.where(inside, sign * values, float("-inf")))
    tl.store(totals + row, tl.where(row < SUMS, tl.sum(total), sign * tl.max(greatest)))


# A surrogate returns its value, its derivatives by log ratio and by log-prob, and 1.0 where the ratio is clipped from
# below and from above. Where the ratio is one number for a sequence, so are the derivative by it and the two flags.


@triton.jit
def _clipped(
    ratio: tl.tensor,
    advantage: tl.tensor,
    logprob: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    delta: tl.tensor,
    tau_pos: tl.tensor,
    tau_neg: tl.tensor,
) -> Any:
    bounded = tl.minimum(ratio, delta)
    policy = bounded * advantage
    clipped_policy = tl.minimum(tl.maximum(ratio, low), high) * advantage
    moves = tl.where(policy < clipped_policy, ratio <= delta, (ratio >= low) & (ratio <= high))
    by_log_ratio = tl.where(moves, -advantage * ratio, 0.0)
    is_low = tl.where(bounded < low, (advantage < 0).to(tl.float32), 0.0)
    is_high = tl.where(bounded > high, (advantage > 0).to(tl.float32), 0.0)
    return -tl.minimum(policy, clipped_policy), by_log_ratio, 0.0, is_low, is_high


@triton.jit
def _cispo(
    ratio: tl.tensor,
    advantage: tl.tensor,
    logprob: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    delta: tl.tensor,
    tau_pos: tl.tensor,
    tau_neg: tl.tensor,
) -> Any:
    by_logprob = -tl.minimum(ratio, high) * advantage
    is_high = tl.where(ratio > high, (advantage > 0).to(tl.float32), 0.0)
    return by_logprob * logprob, 0.0, by_logprob, 0.0, is_high


@triton.jit
def _sapo(
    ratio: tl.tensor,
    advantage: tl.tensor,
    logprob: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    delta: tl.tensor,
    tau_pos: tl.tensor,
    tau_neg: tl.tensor,
) -> Any:
    tau = tl.where(advantage > 0, tau_pos, tau_neg)
    gate = tl.sigmoid(tau * (ratio - 1))
    return -4 * gate / tau * advantage, -4 * gate * (1 - gate) * ratio * advantage, 0.0, 0.0, 0.0


@triton.jit
def _reinforce(
    ratio: tl.tensor,
    advantage: tl.tensor,
    logprob: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    delta: tl.tensor,
    tau_pos: tl.tensor,
    tau_neg: tl.tensor,
) -> Any:
    return -advantage * logprob, 0.0, -advantage, 0.0, 0.0


@triton.jit
def _ratio(log_ratio: tl.tensor) -> Any:
    """exp(log ratio), constant beyond the cap; and 1.0 where it is not capped."""
    held = tl.minimum(tl.maximum(log_ratio, -_RATIO_CAP), _RATIO_CAP)
    return tl.exp(held), (held == log_ratio).to(tl.float32)


@triton.jit
def _k3(logprob: tl.tensor, ref_logprob: tl.tensor) -> Any:
    """exp(d) − d − 1 with d = reference − policy log-prob, constant where |d| > KL_CAP; its slope by the latter."""
    d = ref_logprob - logprob
    held = tl.minimum(tl.maximum(d, -_KL_CAP), _KL_CAP)
    # exp(d) − d − 1 cancels where d is small; the series' first term left out is 4e-8 of the sum at |d| = 1/2.
    series = 1 + held / 5 * (1 + held / 6 * (1 + held / 7 * (1 + held / 8)))
    series = held * held / 2 * (1 + held / 3 * (1 + held / 4 * series))
    kl = tl.where(tl.abs(held) < 0.5, series, tl.exp(held) - held - 1)
    return kl, tl.where(held == d, -(kl + held), 0.0)


@triton.jit
def _counted(mask: tl.tensor | None, tokens: tl.tensor, end: tl.tensor) -> tl.tensor:
    """Which of a block's tokens belong to the sequence and are masked in."""
    inside = tokens < end
    if mask is not None:
        inside = tl.load(mask + tokens, mask=inside, other=0) != 0
    return inside


@triton.jit
def _load(values: tl.tensor | None, tokens: tl.tensor, counted: tl.tensor, default: tl.tensor) -> tl.tensor:
    """A block of an argument in float32, reading counted tokens only; `default` if missing."""
    if values is None:
        return default
    else:  # noqa: RET505 - in Triton the branch not taken must not be compiled
        return tl.load(values + tokens, mask=counted, other=0.0).to(tl.float32)


SURROGATES: dict[str, Callable[..., Any]] = {
    "clipped": _clipped,
    "cispo": _cispo,
    "sapo": _sapo,
    "reinforce": _reinforce,
}
