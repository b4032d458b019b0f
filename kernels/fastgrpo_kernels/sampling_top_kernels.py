"""The kernels of `sample` with a truncation: many programs read the logits once; then a few chunks are enough.

A row's tokens are split into chunks. At least k tokens reach the k-th greatest of the chunks' maxima, so all tokens
that top-k keeps lie in the chunks that reach it, about k of them. Only these are searched for the minimum score and
sampled from, in registers. The same holds for top-p and min-p if the tokens they keep are likely enough. If not, or if
too many chunks tie, the row's program reads the whole row, which is slow and rare.
"""

import triton
import triton.language as tl

from fastgrpo_kernels.sampling_scores import (
    add_exp,
    fade,
    gumbel,
    least_score,
    load_scores,
    order,
    penalised,
    row_key,
    scan,
    unorder,
)


@triton.jit
def chunk_kernel(
    logits: tl.tensor,
    seen: tl.tensor,
    suppressed: tl.tensor,
    maxima: tl.tensor,
    sums: tl.tensor,
    logits_stride: tl.tensor,
    vocabulary: tl.tensor,
    chunks: tl.tensor,
    split_size: tl.tensor,
    inverse_temperature: tl.tensor,
    penalty: tl.tensor,
    PENALISE: tl.constexpr,
    SUPPRESS: tl.constexpr,
    MASS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One split of a row: the greatest score of each chunk, and log-sum-exps as (greatest, sum).

    `maxima` [B, chunks]; `sums` [B, splits, 4]: of the tempered logits and, if MASS, of the scores.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits += row * logits_stride
    seen += row * vocabulary
    c = tl.arange(0, BLOCK // CHUNK)
    within = c[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]  # [C, CHUNK]
    full_top = tl.full([BLOCK // CHUNK, CHUNK], float("-inf"), tl.float32)
    score_top = tl.full([BLOCK // CHUNK, CHUNK], float("-inf"), tl.float32)
    full_sum = tl.zeros([BLOCK // CHUNK, CHUNK], tl.float32)
    score_sum = tl.zeros([BLOCK // CHUNK, CHUNK], tl.float32)
    begin = split * split_size
    end = tl.minimum(begin + split_size, vocabulary)
    for start in range(begin, end, BLOCK):
        scores, tempered = load_scores(
            logits, seen, suppressed, start + within, end, inverse_temperature, penalty, PENALISE, SUPPRESS
        )
        scores = tl.where(scores == scores, scores, float("-inf"))
        chunk = start // CHUNK + c
        tl.store(maxima + row * chunks + chunk, tl.max(scores, 1), mask=chunk < chunks)
        full_top, full_sum = add_exp(full_top, full_sum, tempered)
        if MASS:
            score_top, score_sum = add_exp(score_top, score_sum, scores)

    sums += (row * tl.num_programs(1) + split) * 4
    top = tl.max(tl.max(full_top, 1), 0)
    tl.store(sums, top)
    tl.store(sums + 1, tl.sum(tl.sum(full_sum * fade(full_top, top), 1), 0))
    if MASS:
        top = tl.max(tl.max(score_top, 1), 0)
        tl.store(sums + 2, top)
        tl.store(sums + 3, tl.sum(tl.sum(score_sum * fade(score_top, top), 1), 0))


@triton.jit
def hot_kernel(
    maxima: tl.tensor,
    hot: tl.tensor,
    counts: tl.tensor,
    floors: tl.tensor,
    chunks: tl.tensor,
    wanted: tl.tensor,
    HOT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row: a score that `wanted` chunks reach, or as few more as HOT; and which those are.

    `hot` [B, HOT], `counts` [B] (more than HOT where too many tie), `floors` [B]. Where fewer have any finite score,
    all that have one.
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    greatest = tl.load(maxima + row * chunks + c, mask=c < chunks, other=float("-inf"))
    low = order(tl.full([], float("-inf"), tl.float32)) + 1  # the least finite number
    high = order(tl.max(greatest, 0)) + 1
    count = tl.sum((greatest >= unorder(low)).to(tl.int32), 0)
    while (count > HOT) & (high - low > 1):
        middle = (low + high) >> 1
        reach = tl.sum((greatest >= unorder(middle)).to(tl.int32), 0)
        enough = reach >= wanted
        low = tl.where(enough, middle, low)
        count = tl.where(enough, reach, count)
        high = tl.where(enough, high, middle)
    floor = unorder(low)
    is_hot = greatest >= floor
    at = tl.cumsum(is_hot.to(tl.int32), 0) - 1
    tl.store(hot + row * HOT + at, c, mask=is_hot & (at < HOT))
    tl.store(counts + row, count)
    tl.store(floors + row, floor)


@triton.jit
def draw_kernel(
    logits: tl.tensor,
    seen: tl.tensor,
    suppressed: tl.tensor,
    seeds: tl.tensor,
    counters: tl.tensor,
    hot: tl.tensor,
    counts: tl.tensor,
    floors: tl.tensor,
    sums: tl.tensor,
    tokens: tl.tensor,
    logprobs: tl.tensor,
    sampling_logprobs: tl.tensor,
    logits_stride: tl.tensor,
    vocabulary: tl.tensor,
    splits: tl.tensor,
    inverse_temperature: tl.tensor,
    penalty: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    log_min_p: tl.tensor,
    wanted: tl.tensor,
    PENALISE: tl.constexpr,
    SUPPRESS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    CHUNK: tl.constexpr,
    HOT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row: truncates within its hot chunks, draws, and takes both log-probs."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    seen += row * vocabulary
    s = tl.arange(0, BLOCK_S)
    sums += row * (splits * 4) + s * 4
    key_low, key_high = row_key(tl.load(seeds + row), tl.load(counters + row))
    count = tl.load(counts + row)
    i = tl.arange(0, HOT * CHUNK)
    is_hot = i // CHUNK < count
    chunk = tl.load(hot + row * HOT + i // CHUNK, mask=is_hot, other=0)
    token = tl.where(is_hot, chunk * CHUNK + i % CHUNK, vocabulary)
    scores, _tempered = load_scores(
        logits, seen, suppressed, token, vocabulary, inverse_temperature, penalty, PENALISE, SUPPRESS
    )
    top = tl.max(scores, 0)
    floor = tl.load(floors + row)
    least = floor
    # All that the truncations leave must reach the floor, below which tokens are missing here.
    missing = count > HOT
    if TOP_K:
        missing = missing | (top_k > wanted)
        least = _bisect(scores, least, top, top_k, False)
    if TOP_P:
        mass = tl.sum(tl.where(scores >= least, fade(scores, top), 0.0), 0)
        if not TOP_K:
            found = mass
            tops = tl.load(sums + 2, mask=s < splits, other=float("-inf"))
            mass = tl.sum(tl.load(sums + 3, mask=s < splits, other=0.0) * fade(tops, top), 0)
            missing = missing | (found < mass * top_p)
        least = _bisect(scores, least, top, mass * top_p, True)
    if MIN_P:
        if not (TOP_K or TOP_P):
            missing = missing | (top + log_min_p < floor)
        least = tl.maximum(least, top + log_min_p)
    if missing:
        least = least_score(
            logits, seen, suppressed, vocabulary, inverse_temperature, penalty, top_k, top_p, log_min_p,
            PENALISE, SUPPRESS, TOP_K, TOP_P, MIN_P, BLOCK,
        )  # fmt: skip
        _, _, drawn_top, drawn_total, _, winner = scan(
            logits, seen, suppressed, 0, vocabulary, least, key_low, key_high, inverse_temperature, penalty,
            PENALISE, SUPPRESS, True, False, BLOCK,
        )  # fmt: skip
    else:
        drawn = tl.where(scores >= least, scores, float("-inf"))
        drawn_top = tl.max(drawn, 0)
        drawn_total = tl.sum(fade(drawn, drawn_top), 0)
        noisy = drawn + gumbel(token, key_low, key_high)
        best = tl.max(noisy, 0)
        winner = tl.min(tl.where((noisy == best) & (noisy > float("-inf")), token, 0x7FFFFFFF), 0)
        winner = tl.where(winner == 0x7FFFFFFF, 0, winner)  # a row without any finite score

    tl.store(tokens + row, winner.to(tl.int64))
    raw = tl.load(logits + winner).to(tl.float32)
    tops = tl.load(sums, mask=s < splits, other=float("-inf"))
    full_top = tl.max(tops, 0)
    full_total = tl.sum(tl.load(sums + 1, mask=s < splits, other=0.0) * fade(tops, full_top), 0)
    tl.store(logprobs + row, raw * inverse_temperature - full_top - tl.log(full_total))
    if PENALISE:
        raw = tl.where(tl.load(seen + winner) != 0, penalised(raw, penalty), raw)
    tl.store(sampling_logprobs + row, raw * inverse_temperature - drawn_top - tl.log(drawn_total))


@triton.jit
def _bisect(scores: tl.tensor, least: tl.tensor, top: tl.tensor, target: tl.tensor, BY_MASS: tl.constexpr) -> tl.tensor:
    """The greatest score, from `least` on, at and above which `target` tokens, or so much of Σ exp(score − top), lie.

    As `sampling_scores.least_score`, for scores in registers.
    """
    low = order(least)
    high = order(top) + 1
    low_count = tl.sum((scores >= least).to(tl.int32), 0)
    high_count = low_count * 0
    while (high - low > 1) & (low_count - high_count > 1):
        middle = (low + high) >> 1
        inside = scores >= unorder(middle)
        count = tl.sum(inside.to(tl.int32), 0)
        weight = tl.sum(tl.where(inside, fade(scores, top), 0.0), 0) if BY_MASS else count.to(tl.float32)
        enough = weight >= target
        low = tl.where(enough, middle, low)
        low_count = tl.where(enough, count, low_count)
        high = tl.where(enough, high, middle)
        high_count = tl.where(enough, high_count, count)
    return unorder(low)
