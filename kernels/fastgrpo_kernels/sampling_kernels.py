"""The kernels of `sample` without a truncation: the scan over the vocabulary, and its merge."""

import triton
import triton.language as tl

from fastgrpo_kernels.sampling_scores import fade, penalised, row_key, scan


@triton.jit
def scan_kernel(
    logits: tl.tensor,
    seen: tl.tensor,
    suppressed: tl.tensor,
    seeds: tl.tensor,
    counters: tl.tensor,
    sums: tl.tensor,
    best_tokens: tl.tensor,
    logits_stride: tl.tensor,
    vocabulary: tl.tensor,
    split_size: tl.tensor,
    inverse_temperature: tl.tensor,
    penalty: tl.tensor,
    PENALISE: tl.constexpr,
    SUPPRESS: tl.constexpr,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One split of a row: both log-sum-exps as (greatest, sum), the winner's score with its noise, and the winner.

    `sums` [B, splits, 5], `best_tokens` [B, splits].
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key_low, key_high = row_key(tl.load(seeds + row), tl.load(counters + row))
    begin = split * split_size
    full, full_total, drawn, drawn_total, winner, token = scan(
        logits + row * logits_stride, seen + row * vocabulary, suppressed, begin,
        tl.minimum(begin + split_size, vocabulary), float("-inf"), key_low, key_high, inverse_temperature, penalty,
        PENALISE, SUPPRESS, False, GREEDY, BLOCK,
    )  # fmt: skip
    at = row * tl.num_programs(1) + split
    tl.store(sums + at * 5, full)
    tl.store(sums + at * 5 + 1, full_total)
    if PENALISE or SUPPRESS:
        tl.store(sums + at * 5 + 2, drawn)
        tl.store(sums + at * 5 + 3, drawn_total)
    tl.store(sums + at * 5 + 4, winner)
    tl.store(best_tokens + at, token)


@triton.jit
def winner_kernel(
    logits: tl.tensor,
    seen: tl.tensor,
    sums: tl.tensor,
    best_tokens: tl.tensor,
    tokens: tl.tensor,
    logprobs: tl.tensor,
    sampling_logprobs: tl.tensor,
    logits_stride: tl.tensor,
    vocabulary: tl.tensor,
    inverse_temperature: tl.tensor,
    penalty: tl.tensor,
    splits: tl.tensor,
    PENALISE: tl.constexpr,
    DIFFERENT: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """One row: the winner of its splits, and both of its log-probs. DIFFERENT: the two distributions differ."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    inside = s < splits
    sums += row * (splits * 5) + s * 5
    best = tl.load(sums + 4, mask=inside, other=float("-inf"))
    candidates = tl.load(best_tokens + row * splits + s, mask=inside, other=0x7FFFFFFF)
    token = tl.min(tl.where(best == tl.max(best, 0), candidates, 0x7FFFFFFF), 0)
    tl.store(tokens + row, token.to(tl.int64))
    raw = tl.load(logits + row * logits_stride + token).to(tl.float32)
    tops = tl.load(sums, mask=inside, other=float("-inf"))
    top = tl.max(tops, 0)
    total = tl.sum(tl.load(sums + 1, mask=inside, other=0.0) * fade(tops, top), 0)
    logprob = raw * inverse_temperature - top - tl.log(total)
    tl.store(logprobs + row, logprob)
    if DIFFERENT:
        if PENALISE:
            is_seen = tl.load(seen + row * vocabulary + token) != 0
            raw = tl.where(is_seen, penalised(raw, penalty), raw)
        tops = tl.load(sums + 2, mask=inside, other=float("-inf"))
        top = tl.max(tops, 0)
        total = tl.sum(tl.load(sums + 3, mask=inside, other=0.0) * fade(tops, top), 0)
        logprob = raw * inverse_temperature - top - tl.log(total)
    tl.store(sampling_logprobs + row, logprob)
