"""Shared by the kernels of `sample`: a row's scores and noise, a truncation's minimum score, the scan of a range."""

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
def least_score(
    logits: tl.tensor,
    seen: tl.tensor,
    suppressed: tl.tensor,
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
) -> tl.tensor:
    """The minimum score that a row's truncations keep; tokens below it are not drawn. Reads the row many times."""
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        scores, _ = load_scores(
            logits, seen, suppressed, token, vocabulary, inverse_temperature, penalty, PENALISE, SUPPRESS
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
    return least


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

    Bisects float32 bit patterns; ends early once a single token is undecided. At most 33 passes over the row.
    """
    low = order(least)
    high = order(top) + 1
    low_count, weight = _at_least(
        logits, seen, suppressed, vocabulary, inverse_temperature, penalty, least, top,
        BY_MASS, PENALISE, SUPPRESS, BLOCK,
    )  # fmt: skip
    target = weight * wanted if BY_MASS else wanted
    high_count = low_count * 0
    while (high - low > 1) & (low_count - high_count > 1):
        middle = (low + high) >> 1
        count, weight = _at_least(
            logits, seen, suppressed, vocabulary, inverse_temperature, penalty, unorder(middle), top,
            BY_MASS, PENALISE, SUPPRESS, BLOCK,
        )  # fmt: skip
        enough = weight >= target
        low = tl.where(enough, middle, low)
        low_count = tl.where(enough, count, low_count)
        high = tl.where(enough, high, middle)
        high_count = tl.where(enough, high_count, count)
    return unorder(low)


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
        token = start + tl.arange(0, BLOCK)
        scores, _ = load_scores(
            logits, seen, suppressed, token, vocabulary, inverse_temperature, penalty, PENALISE, SUPPRESS
        )
        inside = (scores >= least) & (token < vocabulary)
        counts += inside.to(tl.int32)
        if BY_MASS:
            masses += tl.where(inside, tl.exp(scores - top), 0.0)
    count = tl.sum(counts, 0)
    return count, tl.sum(masses, 0) if BY_MASS else count.to(tl.float32)  # a count is exact below 2^24


@triton.jit
def order(x: tl.tensor) -> tl.tensor:
    """float32 → int64 in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def unorder(order: tl.tensor) -> tl.tensor:
    """Back from `order`."""
    bits = order.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def scan(
    logits: tl.tensor,
    seen: tl.tensor,
    suppressed: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    least: tl.tensor,
    key_low: tl.tensor,
    key_high: tl.tensor,
    inverse_temperature: tl.tensor,
    penalty: tl.tensor,
    PENALISE: tl.constexpr,
    SUPPRESS: tl.constexpr,
    TRUNCATE: tl.constexpr,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Tokens begin … end of a row: both log-sum-exps as (greatest, sum), the winner's score with its noise, and it."""
    full_top = tl.full([BLOCK], float("-inf"), tl.float32)
    drawn_top = tl.full([BLOCK], float("-inf"), tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    full_sum = tl.zeros([BLOCK], tl.float32)
    drawn_sum = tl.zeros([BLOCK], tl.float32)
    best_token = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        scores, tempered = load_scores(
            logits, seen, suppressed, token, end, inverse_temperature, penalty, PENALISE, SUPPRESS
        )
        full_top, full_sum = add_exp(full_top, full_sum, tempered)
        if PENALISE or SUPPRESS or TRUNCATE:
            scores = tl.where(scores >= least, scores, float("-inf"))
            drawn_top, drawn_sum = add_exp(drawn_top, drawn_sum, scores)
        if not GREEDY:
            scores += gumbel(token, key_low, key_high)
        better = scores > best  # a lane sees its tokens in ascending order: the first of equals stays
        best = tl.where(better, scores, best)
        best_token = tl.where(better, token, best_token)

    full, drawn, winner = tl.max(full_top, 0), tl.max(drawn_top, 0), tl.max(best, 0)
    full_total = tl.sum(full_sum * fade(full_top, full), 0)
    drawn_total = tl.sum(drawn_sum * fade(drawn_top, drawn), 0)
    return full, full_total, drawn, drawn_total, winner, tl.min(tl.where(best == winner, best_token, 0x7FFFFFFF), 0)


@triton.jit
def load_scores(
    logits: tl.tensor,
    seen: tl.tensor,
    suppressed: tl.tensor,
    token: tl.tensor,
    end: tl.tensor,
    inverse_temperature: tl.tensor,
    penalty: tl.tensor,
    PENALISE: tl.constexpr,
    SUPPRESS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Tokens of a row: suppressed, penalised and tempered scores, and tempered logits; −inf from `end` on."""
    inside = token < end
    raw = tl.load(logits + token, mask=inside, other=float("-inf")).to(tl.float32)
    scores = raw
    if PENALISE:
        is_seen = tl.load(seen + token, mask=inside, other=0) != 0
        scores = tl.where(is_seen, penalised(scores, penalty), scores)
    if SUPPRESS:
        is_suppressed = tl.load(suppressed + token, mask=inside, other=0) != 0
        scores = tl.where(is_suppressed, float("-inf"), scores)
    return scores * inverse_temperature, raw * inverse_temperature


@triton.jit
def penalised(score: tl.tensor, penalty: tl.tensor) -> tl.tensor:
    return tl.where(score < 0, score * penalty, score / penalty)


@triton.jit
def add_exp(top: tl.tensor, total: tl.tensor, score: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Online log-sum-exp, each lane its own: `total` is a sum of exp(score − top)."""
    new_top = tl.maximum(top, score)
    return new_top, total * fade(top, new_top) + fade(score, new_top)


@triton.jit
def fade(x: tl.tensor, top: tl.tensor) -> tl.tensor:
    """exp(x − top), 0 where both are −inf."""
    return tl.exp(x - tl.where(top == float("-inf"), 0.0, top))


@triton.jit
def row_key(seed: tl.tensor, counter: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
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
def gumbel(token: tl.tensor, key_low: tl.tensor, key_high: tl.tensor) -> tl.tensor:
    """−log(−log(1 − w)) of the uniform w."""
    w = uniform(token, key_low, key_high)
    u = 1.0 - w
    # log1p(−w), accurate for small w too: log(u) · w / (1 − u), where u is 1 − w rounded.
    exponential = tl.where(u == 1.0, w, -tl.log(u) * (w / tl.where(u == 1.0, 1.0, 1.0 - u)))
    return -tl.log(exponential)
