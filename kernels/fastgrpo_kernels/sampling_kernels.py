"""The kernels of `sample`: a truncation's least score by bisection, the scan over the vocabulary, and its merge."""

import triton
import triton.language as tl

from fastgrpo_kernels.reference import sampling as reference

_MIX32_A = tl.constexpr(reference.MIX32_A)
_MIX32_B = tl.constexpr(reference.MIX32_B)
_MIX32_C = tl.constexpr(reference.MIX32_C)
_GOLDEN64 = tl.constexpr(reference.GOLDEN64)
_MIX64_A = tl.constexpr(reference.MIX64_A)
_MIX64_B = tl.constexpr(reference.MIX64_B)
_UNIT = tl.constexpr(reference.UNIT)


@triton.jit
def least_score_kernel(
    logits: tl.tensor,
    seen: tl.tensor,
    suppressed: tl.tensor,
    least_scores: tl.tensor,
    logits_stride: tl.tensor,
    vocabulary: tl.tensor,
    inverse_temperature: tl.tensor,
    penalty: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    log_min_p: tl.tensor,
    PENALISE: tl.constexpr,
    SUPPRESS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The least score that one row's truncations leave: tokens below it are not drawn."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    seen += row * vocabulary
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        scores, _ = _load_scores(
            logits, seen, suppressed, start, vocabulary, inverse_temperature, penalty, PENALISE, SUPPRESS, BLOCK
        )
        greatest = tl.maximum(greatest, scores)
    top = tl.max(greatest, 0)
    least = tl.full([], float("-inf"), tl.float32)
    if TOP_K:
        least = _bisect(
            logits, seen, suppressed, vocabulary, inverse_temperature, penalty, least, top, top_k, False,
            PENALISE, SUPPRESS, BLOCK,
        )  # fmt: skip
    if TOP_P:
        least = _bisect(
            logits, seen, suppressed, vocabulary, inverse_temperature, penalty, least, top, top_p, True,
            PENALISE, SUPPRESS, BLOCK,
        )  # fmt: skip
    if MIN_P:
        least = tl.maximum(least, top + log_min_p)
    tl.store(least_scores + row, least)


@triton.jit
def _bisect(
    logits: tl.tensor,
    seen: tl.tensor,
    suppressed: tl.tensor,
    vocabulary: tl.tensor,
    inverse_temperature: tl.tensor,
    penalty: tl.tensor,
    least: tl.tensor,
    top: tl.tensor,
    wanted: tl.tensor,
    BY_MASS: tl.constexpr,
    PENALISE: tl.constexpr,
    SUPPRESS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The greatest score, from `least` on, at and above which `wanted` tokens lie, or that share of the mass.

    Halves an interval of float32 bit patterns; ends early where a single token is left to decide about. At most 33
    passes over the row.
    """
    low = _order(least)
    high = _order(top) + 1
    low_count, weight = _at_least(
        logits, seen, suppressed, vocabulary, inverse_temperature, penalty, least, top,
        BY_MASS, PENALISE, SUPPRESS, BLOCK,
    )  # fmt: skip
    target = weight * wanted if BY_MASS else wanted
    high_count = low_count * 0
    while (high - low > 1) & (low_count - high_count > 1):
        middle = (low + high) >> 1
        count, weight = _at_least(
            logits, seen, suppressed, vocabulary, inverse_temperature, penalty, _unorder(middle), top,
            BY_MASS, PENALISE, SUPPRESS, BLOCK,
        )  # fmt: skip
        enough = weight >= target
        low = tl.where(enough, middle, low)
        low_count = tl.where(enough, count, low_count)
        high = tl.where(enough, high, middle)
        high_count = tl.where(enough, high_count, count)
    return _unorder(low)


@triton.jit
def _at_least(
    logits: tl.tensor,
    seen: tl.tensor,
    suppressed: tl.tensor,
    vocabulary: tl.tensor,
    inverse_temperature: tl.tensor,
    penalty: tl.tensor,
    least: tl.tensor,
    top: tl.tensor,
    BY_MASS: tl.constexpr,
    PENALISE: tl.constexpr,
    SUPPRESS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """How many scores are `least` or more, and their weight: the sum of exp(score − top), or the count again."""
    counts = tl.zeros([BLOCK], tl.int32)
    masses = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        scores, _ = _load_scores(
            logits, seen, suppressed, start, vocabulary, inverse_temperature, penalty, PENALISE, SUPPRESS, BLOCK
        )
        inside = (scores >= least) & (start + tl.arange(0, BLOCK) < vocabulary)
        counts += inside.to(tl.int32)
        if BY_MASS:
            masses += tl.where(inside, tl.exp(scores - top), 0.0)
    count = tl.sum(counts, 0)
    return count, tl.sum(masses, 0) if BY_MASS else count.to(tl.float32)  # a count is exact below 2^24


@triton.jit
def _order(x: tl.tensor) -> tl.tensor:
    """float32 → int64 in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _unorder(order: tl.tensor) -> tl.tensor:
    """Back from `_order`."""
    bits = order.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def scan_kernel(
    logits: tl.tensor,
    seen: tl.tensor,
    suppressed: tl.tensor,
    least_scores: tl.tensor,
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
    TRUNCATE: tl.constexpr,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One split of a row: both log-sum-exps as (greatest, sum), the winner's score with its noise, and the winner.

    `sums` [B, splits, 5], `best_tokens` [B, splits].
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits += row * logits_stride
    seen += row * vocabulary
    least = float("-inf")
    if TRUNCATE:
        least = tl.load(least_scores + row)
    key_low, key_high = _row_key(tl.load(seeds + row), tl.load(counters + row))
    full_top = tl.full([BLOCK], float("-inf"), tl.float32)
    drawn_top = tl.full([BLOCK], float("-inf"), tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    full_sum = tl.zeros([BLOCK], tl.float32)
    drawn_sum = tl.zeros([BLOCK], tl.float32)
    best_token = tl.zeros([BLOCK], tl.int32)
    begin = split * split_size
    end = tl.minimum(begin + split_size, vocabulary)
    for start in range(begin, end, BLOCK):
        scores, tempered = _load_scores(
            logits, seen, suppressed, start, end, inverse_temperature, penalty, PENALISE, SUPPRESS, BLOCK
        )
        full_top, full_sum = _add_exp(full_top, full_sum, tempered)
        if PENALISE or SUPPRESS or TRUNCATE:
            scores = tl.where(scores >= least, scores, float("-inf"))
            drawn_top, drawn_sum = _add_exp(drawn_top, drawn_sum, scores)
        token = start + tl.arange(0, BLOCK)
        if not GREEDY:
            scores += _gumbel(token, key_low, key_high)
        better = scores > best  # a lane sees its tokens in ascending order: the first of equals stays
        best = tl.where(better, scores, best)
        best_token = tl.where(better, token, best_token)

    at = row * tl.num_programs(1) + split
    top = tl.max(full_top, 0)
    tl.store(sums + at * 5, top)
    tl.store(sums + at * 5 + 1, tl.sum(full_sum * _fade(full_top, top), 0))
    if PENALISE or SUPPRESS or TRUNCATE:
        top = tl.max(drawn_top, 0)
        tl.store(sums + at * 5 + 2, top)
        tl.store(sums + at * 5 + 3, tl.sum(drawn_sum * _fade(drawn_top, top), 0))
    winner = tl.max(best, 0)
    tl.store(sums + at * 5 + 4, winner)
    tl.store(best_tokens + at, tl.min(tl.where(best == winner, best_token, 0x7FFFFFFF), 0))


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
    total = tl.sum(tl.load(sums + 1, mask=inside, other=0.0) * _fade(tops, top), 0)
    logprob = raw * inverse_temperature - top - tl.log(total)
    tl.store(logprobs + row, logprob)
    if DIFFERENT:
        if PENALISE:
            is_seen = tl.load(seen + row * vocabulary + token) != 0
            raw = tl.where(is_seen, _penalised(raw, penalty), raw)
        tops = tl.load(sums + 2, mask=inside, other=float("-inf"))
        top = tl.max(tops, 0)
        total = tl.sum(tl.load(sums + 3, mask=inside, other=0.0) * _fade(tops, top), 0)
        logprob = raw * inverse_temperature - top - tl.log(total)
    tl.store(sampling_logprobs + row, logprob)


@triton.jit
def _load_scores(
    logits: tl.tensor,
    seen: tl.tensor,
    suppressed: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    inverse_temperature: tl.tensor,
    penalty: tl.tensor,
    PENALISE: tl.constexpr,
    SUPPRESS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """BLOCK tokens of a row from `start` on: suppressed, penalised and tempered scores, and tempered logits."""
    token = start + tl.arange(0, BLOCK)
    inside = token < end
    raw = tl.load(logits + token, mask=inside, other=float("-inf")).to(tl.float32)
    scores = raw
    if PENALISE:
        is_seen = tl.load(seen + token, mask=inside, other=0) != 0
        scores = tl.where(is_seen, _penalised(scores, penalty), scores)
    if SUPPRESS:
        is_suppressed = tl.load(suppressed + token, mask=inside, other=0) != 0
        scores = tl.where(is_suppressed, float("-inf"), scores)
    return scores * inverse_temperature, raw * inverse_temperature


@triton.jit
def _penalised(score: tl.tensor, penalty: tl.tensor) -> tl.tensor:
    return tl.where(score < 0, score * penalty, score / penalty)


@triton.jit
def _add_exp(top: tl.tensor, total: tl.tensor, score: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Online log-sum-exp, each lane its own: `total` is a sum of exp(score − top)."""
    new_top = tl.maximum(top, score)
    return new_top, total * _fade(top, new_top) + _fade(score, new_top)


@triton.jit
def _fade(x: tl.tensor, top: tl.tensor) -> tl.tensor:
    """exp(x − top), 0 where both are −inf."""
    return tl.exp(x - tl.where(top == float("-inf"), 0.0, top))


@triton.jit
def _row_key(seed: tl.tensor, counter: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """`reference.sampling.row_keys` of one row: two uint32."""
    key = _mix64(_mix64(seed.to(tl.uint64)) + counter.to(tl.uint64) * _GOLDEN64)
    return key.to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def _mix64(x: tl.tensor) -> tl.tensor:
    x = x + _GOLDEN64
    x = (x ^ (x >> 30)) * _MIX64_A
    x = (x ^ (x >> 27)) * _MIX64_B
    return x ^ (x >> 31)


@triton.jit
def uniform(token: tl.tensor, key_low: tl.tensor, key_high: tl.tensor) -> tl.tensor:
    """`reference.sampling.uniforms` of int32 token ids under one row's key, bit for bit."""
    x = (token + 1).to(tl.uint32) * _MIX32_C
    x = (x ^ (x >> 16)) * _MIX32_A
    x = (x ^ (x >> 13)) ^ key_low
    x = x * _MIX32_A
    x = (x ^ (x >> 15)) * (key_high | 1)
    x = (x ^ (x >> 16)) * _MIX32_B
    return ((x & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * _UNIT


@triton.jit
def _gumbel(token: tl.tensor, key_low: tl.tensor, key_high: tl.tensor) -> tl.tensor:
    """−log(−log(1 − w)) of the uniform w."""
    w = uniform(token, key_low, key_high)
    u = 1.0 - w
    # log1p(−w), accurate for small w too: log(u) · w / (1 − u), where u is 1 − w rounded.
    exponential = tl.where(u == 1.0, w, -tl.log(u) * (w / tl.where(u == 1.0, 1.0, 1.0 - u)))
    return -tl.log(exponential)
