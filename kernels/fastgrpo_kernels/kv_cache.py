"""Rotary embedding of queries and keys, and writing keys and values to a paged cache, in one pass."""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels import cpu
from fastgrpo_kernels.backend import Backend, pick_backend, register_operator
from fastgrpo_kernels.checks import check_caches, shape_of
from fastgrpo_kernels.tl_utils import bytes_of, launch


def rope_and_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Rotates queries and keys, writes keys and values into their slots, returns the queries [T, Hq, D].

    The rotation is x·cos + rotate_half(x)·sin over the two halves of D, computed in the wider dtype of x and cos and
    rounded once. No gradients.

    Args:
        query: [T, Hq, D]; like key and value it may be a view into one packed [T, (Hq + 2 Hkv) · D].
        key: [T, Hkv, D].
        value: [T, Hkv, D].
        cos: [T, D] of each token's position, float32 or the queries' dtype; sections of M-RoPE merged already.
        sin: [T, D].
        key_cache: [pages, page_size, Hkv, D], written in place.
        value_cache: the same.
        slots: [T] int64, page · page_size + offset; −1: the token is not written. No slot twice.

    Raises:
        ValueError: shapes that do not fit, or caches that are not contiguous.
    """
    check_caches(key_cache, value_cache)
    tokens, _, width = query.shape
    if key.shape != value.shape or key.shape != (tokens, key_cache.shape[2], width) or width % 2:
        raise ValueError(
            f"query {shape_of(query)}, key {shape_of(key)}, value {shape_of(value)} do not fit caches "
            f"{shape_of(key_cache)}: pass [T, Hq, D] and twice [T, Hkv, D], with D even."
        )
    if cos.shape != (tokens, width) or sin.shape != cos.shape or slots.shape != (tokens,):
        raise ValueError(
            f"cos {shape_of(cos)}, sin {shape_of(sin)}, slots {shape_of(slots)} do not fit query {shape_of(query)}: "
            "pass [T, D], [T, D] and [T]."
        )
    if pick_backend(query, backend) == "torch":
        return cpu.rope_and_cache(query, key, value, cos, sin, key_cache, value_cache, slots)
    return _operator(query, key, value, cos, sin, key_cache, value_cache, slots)


def _fake(query: Tensor, *_: Tensor) -> Tensor:
    return query.new_empty(query.shape)


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    tokens, heads, width = query.shape
    kv_heads = key.shape[1]
    rotated = torch.empty((tokens, heads, width), dtype=query.dtype, device=query.device)
    if tokens:
        launch(
            _rope_and_cache_kernel,
            (tokens, kv_heads),
            query,
            key,
            value,
            cos.contiguous(),
            sin.contiguous(),
            key_cache,
            value_cache,
            slots.contiguous(),
            rotated,
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            KV_HEADS=kv_heads,
            QUERY_HEADS=heads // kv_heads,
            HALF=width // 2,
            BLOCK_HEADS=triton.next_power_of_2(heads // kv_heads),
            BLOCK_HALF=triton.next_power_of_2(width // 2),
            moved=2 * bytes_of(query, key, value) + bytes_of(cos, sin, slots),
            num_warps=1 if heads // kv_heads <= 2 else 4,
        )
    return rotated


_operator = register_operator(
    "rope_and_cache(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor(a!) key_cache, "
    "Tensor(b!) value_cache, Tensor slots) -> Tensor",
    _launch,
    _fake,
)


@triton.jit
def _rope_and_cache_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    slots: tl.tensor,
    rotated: tl.tensor,
    query_stride_token: tl.tensor,
    query_stride_head: tl.tensor,
    key_stride_token: tl.tensor,
    key_stride_head: tl.tensor,
    value_stride_token: tl.tensor,
    value_stride_head: tl.tensor,
    KV_HEADS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    """One token and KV head, with the QUERY_HEADS query heads that read it."""
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    d = tl.arange(0, BLOCK_HALF)
    inside = d < HALF
    cos += token * (2 * HALF)
    sin += token * (2 * HALF)
    cos_low = tl.load(cos + d, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + HALF + d, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + d, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + HALF + d, mask=inside, other=0.0).to(tl.float32)

    r = tl.arange(0, BLOCK_HEADS)
    head = kv_head * QUERY_HEADS + r
    mask = (r < QUERY_HEADS)[:, None] & inside[None, :]
    source = query + token * query_stride_token + head[:, None] * query_stride_head + d[None, :]
    low = tl.load(source, mask=mask, other=0.0).to(tl.float32)  # [R, D / 2]
    high = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    target = rotated + (token * (KV_HEADS * QUERY_HEADS) + head[:, None]) * (2 * HALF) + d[None, :]
    tl.store(target, low * cos_low[None, :] - high * sin_low[None, :], mask=mask)
    tl.store(target + HALF, high * cos_high[None, :] + low * sin_high[None, :], mask=mask)

    slot = tl.load(slots + token)
    written = d < tl.where(slot >= 0, HALF, 0)
    at = (slot * KV_HEADS + kv_head) * (2 * HALF) + d
    source = key + token * key_stride_token + kv_head * key_stride_head + d
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(key_cache + at, low * cos_low - high * sin_low, mask=written)
    tl.store(key_cache + at + HALF, high * cos_high + low * sin_high, mask=written)
    source = value + token * value_stride_token + kv_head * value_stride_head + d
    tl.store(value_cache + at, tl.load(source, mask=inside, other=0.0), mask=written)
    tl.store(value_cache + at + HALF, tl.load(source + HALF, mask=inside, other=0.0), mask=written)


def aot_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls of the launcher on meta tensors: the 2B and the 7B model, decode and prefill."""

    def case(tokens: int, heads: int, kv_heads: int) -> Callable[[], None]:
        def run() -> None:
            packed = torch.empty(tokens, heads + 2 * kv_heads, 128, dtype=torch.bfloat16, device="meta")
            query, key, value = packed.split([heads, kv_heads, kv_heads], dim=1)
            angle = torch.empty(tokens, 128, dtype=torch.float32, device="meta")
            cache = torch.empty(64, 16, kv_heads, 128, dtype=torch.bfloat16, device="meta")
            slots = torch.empty(tokens, dtype=torch.int64, device="meta")
            _launch(query, key, value, angle, angle, cache, cache, slots)

        return run

    for heads, kv_heads in ((12, 2), (28, 4)):
        for tokens in (8, 512, 16384):
            yield f"rope_and_cache {heads}/{kv_heads} T={tokens}", case(tokens, heads, kv_heads)
