"""Rotary embedding of queries and keys together, with its derivative."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgrpo_kernels import reference
from fastgrpo_kernels.backend import Backend, pick_backend, register_operator
from fastgrpo_kernels.checks import shape_of
from fastgrpo_kernels.tl_utils import launch


def apply_rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """x · cos + rotate_half(x) · sin over the two halves of D, of queries and keys; differentiable in both.

    Computed in float32 and rounded once, to their dtype.

    Args:
        query: [T, Hq, D]; like the keys it may be a view whose D elements lie side by side.
        key: [T, Hkv, D].
        cos, sin: [T, D] of each token's position; sections of M-RoPE merged already.

    Raises:
        ValueError: shapes that do not fit.
    """
    tokens, _, width = query.shape
    if key.shape[0] != tokens or key.shape[2] != width or width % 2 or key.dtype != query.dtype:
        raise ValueError(
            f"query {query.dtype} {shape_of(query)}, key {key.dtype} {shape_of(key)} do not fit: pass [T, Hq, D] and "
            "[T, Hkv, D] of one dtype, with D even."
        )
    if cos.shape != (tokens, width) or sin.shape != cos.shape:
        raise ValueError(f"cos {shape_of(cos)}, sin {shape_of(sin)} do not fit query {shape_of(query)}: pass [T, D].")
    if pick_backend(query, backend) == "torch":
        return reference.apply_rotary(query, key, cos, sin)
    found: tuple[Tensor, Tensor] = _Rotary.apply(query, key, cos, sin)
    return found


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        found: tuple[Tensor, Tensor] = _operator(query, key, cos, sin, False)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
        return *_operator(grad_query, grad_key, *ctx.saved_tensors, True), None, None


def _launch(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """`transposed` applies the transposed rotation, for gradients."""
    query, key = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key))
    tokens, heads, width = query.shape
    rotated_query, rotated_key = _fake(query, key)
    if tokens:
        launch(
            _rotary_kernel,
            (tokens,),
            query,
            key,
            cos.contiguous(),
            sin.contiguous(),
            rotated_query,
            rotated_key,
            *query.stride()[:2],
            *key.stride()[:2],
            TRANSPOSED=transposed,
            **_tile(heads, key.shape[1], width // 2),
        )
    return rotated_query, rotated_key


@functools.cache
def _tile(heads: int, kv_heads: int, half: int) -> dict[str, int]:
    sizes = {"HEADS": heads, "KV_HEADS": kv_heads, "HALF": half}
    return sizes | {f"BLOCK_{name}": triton.next_power_of_2(size) for name, size in sizes.items()} | {"num_warps": 4}


def _fake(query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


_operator = register_operator(
    "apply_rotary(Tensor query, Tensor key, Tensor cos, Tensor sin, bool transposed) -> (Tensor, Tensor)",
    _launch,
    _fake,
)


@triton.jit
def _rotary_kernel(
    query: tl.tensor,
    key: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    rotated_query: tl.tensor,
    rotated_key: tl.tensor,
    query_stride_token: tl.tensor,
    query_stride_head: tl.tensor,
    key_stride_token: tl.tensor,
    key_stride_head: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KV_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    TRANSPOSED: tl.constexpr,
) -> None:
    """All heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_HALF)
    inside = d < HALF
    at = token * (2 * HALF) + d
    cos_low = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + at + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + at + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    if TRANSPOSED:
        sin_low, sin_high = -sin_high, -sin_low

    head = tl.arange(0, BLOCK_HEADS)[:, None]
    mask = (head < HEADS) & inside[None, :]
    source = query + token * query_stride_token + head * query_stride_head + d[None, :]
    low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    target = rotated_query + (token * HEADS + head) * (2 * HALF) + d[None, :]
    tl.store(target, (low * cos_low - high * sin_low).to(rotated_query.dtype.element_ty), mask=mask)
    tl.store(target + HALF, (high * cos_high + low * sin_high).to(rotated_query.dtype.element_ty), mask=mask)

    head = tl.arange(0, BLOCK_KV_HEADS)[:, None]
    mask = (head < KV_HEADS) & inside[None, :]
    source = key + token * key_stride_token + head * key_stride_head + d[None, :]
    low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    target = rotated_key + (token * KV_HEADS + head) * (2 * HALF) + d[None, :]
    tl.store(target, (low * cos_low - high * sin_low).to(rotated_key.dtype.element_ty), mask=mask)
    tl.store(target + HALF, (high * cos_high + low * sin_high).to(rotated_key.dtype.element_ty), mask=mask)


def aot_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls of the launcher on meta tensors: 2B, 7B, and the vision tower, whose projection is packed."""

    def case(heads: int, kv_heads: int, width: int, transposed: bool) -> Callable[[], None]:
        def run() -> None:
            angle = torch.empty(16384, width, dtype=torch.float32, device="meta")
            if kv_heads == heads:
                qkv = torch.empty(16384, 3, heads, width, dtype=torch.bfloat16, device="meta")
                query, key = qkv[:, 0], qkv[:, 1]
            else:
                query = torch.empty(16384, heads, width, dtype=torch.bfloat16, device="meta")
                key = torch.empty(16384, kv_heads, width, dtype=torch.bfloat16, device="meta")
            _launch(query, key, angle, angle, transposed)

        return run

    for heads, kv_heads, width in ((12, 2, 128), (28, 4, 128), (16, 16, 80)):
        for transposed in (False, True):
            label = f"apply_rotary {heads}/{kv_heads} D={width}{' transposed' if transposed else ''}"
            yield label, case(heads, kv_heads, width, transposed)
