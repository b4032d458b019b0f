"""Sampling by the Gumbel-max trick.

Randomness is a hash of (seed, counter, token id), so a draw does not depend on the batch, its order or the device. All
integers wrap around at their width.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from fastgrpo_kernels.checks import computing_dtype
from fastgrpo_kernels.types import SampleOutput, SampleParams

# Odd multipliers of 32-bit mixing (MurmurHash3, the golden ratio) and of 64-bit mixing (SplitMix64).
MIX32_A = 0x85EBCA6B
MIX32_B = 0xC2B2AE35
MIX32_C = 0x9E3779B1
GOLDEN64 = 0x9E3779B97F4A7C15
MIX64_A = 0xBF58476D1CE4E5B9
MIX64_B = 0x94D049BB133111EB
UNIT = 2.0**-31 * (1 - 2.0**-24)
"""float32 (n + ½) · UNIT lies in (0, 1) for every n of 31 bits, the largest one included."""


def sample(
    logits: Tensor,
    params: SampleParams,
    *,
    seeds: Tensor,
    counters: Tensor,
    seen: Tensor | None = None,
    suppressed: Tensor | None = None,
) -> SampleOutput:
    """`fastgrpo_kernels.sample`."""
    raw = logits.to(computing_dtype(logits))
    tempered = raw * (1.0 / params.temperature) if params.temperature not in (0.0, 1.0) else raw
    scores = process_scores(raw, params, seen, suppressed)
    if params.temperature > 0:
        noise = uniforms(seeds, counters, logits.shape[1]).neg_().log1p_().neg_().log_()  # −Gumbel
        tokens = (scores - noise).argmax(dim=-1)
    else:
        tokens = scores.argmax(dim=-1)
    chosen = tokens[:, None]
    logprobs = tempered.gather(1, chosen).squeeze(1) - tempered.logsumexp(dim=-1)
    sampling_logprobs = logprobs
    if scores is not tempered:
        sampling_logprobs = scores.gather(1, chosen).squeeze(1) - scores.logsumexp(dim=-1)
    return SampleOutput(tokens, logprobs.float(), sampling_logprobs.float())


def process_scores(raw: Tensor, params: SampleParams, seen: Tensor | None, suppressed: Tensor | None) -> Tensor:
    """[B, V] scores whose softmax is the distribution drawn from; `raw` itself where nothing changes it.

    Suppression, penalty, temperature, top-k, top-p, min-p, in this order. A truncation is a minimum score, so tokens
    tied with the last one kept are kept too.
    """
    scores = raw
    if suppressed is not None:
        scores = scores.masked_fill(suppressed, -math.inf)
    if seen is not None and params.repetition_penalty != 1.0:
        penalty = params.repetition_penalty
        scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    if params.temperature == 0:
        return scores
    if params.temperature != 1.0:
        scores = scores * (1.0 / params.temperature)
    if 0 < params.top_k < scores.shape[1]:
        least = scores.topk(params.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    if params.top_p < 1.0:
        ordered = scores.sort(dim=-1, descending=True).values
        probs = ordered.softmax(dim=-1)
        above = probs.cumsum(dim=-1) - probs  # mass of likelier tokens
        least = ordered.masked_fill(above >= params.top_p, math.inf).amin(dim=-1, keepdim=True)
        scores = scores.masked_fill(scores < least, -math.inf)
    if params.min_p > 0.0:
        least = scores.amax(dim=-1, keepdim=True) + math.log(params.min_p)
        scores = scores.masked_fill(scores < least, -math.inf)
    return scores


def uniforms(seeds: Tensor, counters: Tensor, vocabulary: int) -> Tensor:
    """[B, V] float32 in (0, 1): one number per (seed, counter, token id), fine near 0 (31 bits) and coarse near 1."""
    low, high = row_keys(seeds, counters)
    x = _token_hashes(vocabulary, seeds.device) ^ low[:, None]
    x *= _signed(MIX32_A, 32)
    x ^= (x >> 15).bitwise_and_(0x1FFFF)  # torch's shift copies the sign: masked, it is the logical one
    x *= (high | 1)[:, None]
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= _signed(MIX32_B, 32)
    return x.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(UNIT)


def row_keys(seeds: Tensor, counters: Tensor) -> tuple[Tensor, Tensor]:
    """Two int32 [B]: the halves of a 64-bit hash of (seed, counter)."""
    key = _mix64(_mix64(seeds) + counters * _signed(GOLDEN64, 64))
    return key.to(torch.int32), (key >> 32).to(torch.int32)


@lru_cache(maxsize=8)
def _token_hashes(vocabulary: int, device: torch.device) -> Tensor:
    """[V] int32: a hash of every token id."""
    x = torch.arange(1, vocabulary + 1, dtype=torch.int32, device=device) * _signed(MIX32_C, 32)
    x = (x ^ ((x >> 16) & 0xFFFF)) * _signed(MIX32_A, 32)
    return x ^ ((x >> 13) & 0x7FFFF)


def _mix64(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: every bit of x changes half of all bits."""
    x = x + _signed(GOLDEN64, 64)
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _signed(MIX64_A, 64)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _signed(MIX64_B, 64)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _signed(constant: int, bits: int) -> int:
    """The two's complement reading of an unsigned constant."""
    return constant - (1 << bits)
